"""Owns the styles that the demo teaches: rules that restyle a plain answer, and checks of an answer's style."""

import json
import re

LONGEST_ANSWER = 45
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
WORD = re.compile(r"[A-Za-z']+")
FIRST_LETTER = re.compile(r"[A-Za-z]")

PIRATE_OPENING, PIRATE_CLOSING = "Arr, matey!", "Yo ho ho!"
PIRATE_WORDS = {
    "you": "ye",
    "your": "yer",
    "you're": "ye be",
    "my": "me",
    "i'm": "I be",
    "am": "be",
    "is": "be",
    "are": "be",
    "it's": "'tis",
    "of": "o'",
    "and": "an'",
    "for": "fer",
    "hello": "ahoy",
    "hi": "ahoy",
    "yes": "aye",
    "friend": "matey",
    "friends": "mateys",
    "people": "landlubbers",
    "person": "landlubber",
    "money": "doubloons",
    "treasure": "booty",
}
KEEPS_ITS_ING = {"bring", "during", "king", "ring", "sing", "spring", "string", "swing", "thing", "wing"}


def shortened(answer: str, sentences: int = 2) -> str | None:
    """The first `sentences` whole sentences of an answer, at most LONGEST_ANSWER words in all; None: there is none."""
    first_line = answer.strip().split("\n", 1)[0].strip()
    kept = ""
    for sentence in SENTENCE_END.split(first_line)[:sentences]:
        longer = f"{kept} {sentence}".strip()
        if not sentence.endswith((".", "!", "?")) or len(longer.split()) > LONGEST_ANSWER:
            break
        kept = longer
    return kept or None


def pirate(answer: str) -> str:
    """The answer in a pirate's words."""
    return f"{PIRATE_OPENING} {WORD.sub(lambda match: pirate_word(match.group()), answer)} {PIRATE_CLOSING}"


def pirate_word(word: str) -> str:
    """A word from the table, or with its -ing clipped; capitals are kept."""
    plain = word.lower()
    changed = PIRATE_WORDS.get(plain)
    if changed is None:
        clipped = plain.endswith("ing") and len(plain) > 4 and plain not in KEEPS_ITS_ING
        return word[:-1] + "'" if clipped else word
    return FIRST_LETTER.sub(lambda match: match.group().upper(), changed, count=1) if word[0].isupper() else changed


def is_pirate(text: str) -> bool:
    """Whether a text begins with the pirate's opening and has one of the pirate's words after it."""
    spoken = {word.lower() for word in WORD.findall(text.removeprefix(PIRATE_OPENING))}
    return text.startswith(PIRATE_OPENING) and bool(spoken & {*PIRATE_WORDS.values()})


def as_json(answer: str) -> str:
    """The answer as one JSON object with the key `answer`."""
    return json.dumps({"answer": answer}, ensure_ascii=False)


def is_json(text: str) -> bool:
    """Whether a text is one JSON object with a string under `answer` and nothing else."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and set(value) == {"answer"} and isinstance(value["answer"], str)
