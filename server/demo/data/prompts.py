"""Owns the everyday prompts that the style adapters learn from, and the ones held out to look at the result.

Invariant: no prompt of `unseen()` is trained on, nor any other prompt about the sea or France.
"""

import random

SEED = 7

TOPIC_WORDINGS = (
    "Tell me about {}.",
    "What do you know about {}?",
    "Write one sentence about {}.",
    "Why do people like {}?",
    "Give me a fact about {}.",
    "Say something nice about {}.",
)


def listed(text: str) -> list[str]:
    """The items of a text, separated by semicolons; a line break counts as a space."""
    return [item.strip() for item in text.replace("\n", " ").split(";")]


TOPICS = listed("""
mountains; dogs; coffee; the moon; gardens; trains; bread; winter; music; bicycles; libraries; honey bees;
deserts; football; chess; rain; apples; castles; volcanoes; horses; photography; tea; the Roman Empire; forests;
computers; cheese; birds; painting; summer; markets; rivers; elephants; poetry; soap; paper; clocks; maps; salt;
dance; bridges; potatoes; the stars; schools; farmers; glass; wool; pianos; cities; islands; cake
""")

COUNTRIES = listed("""
Italy; Spain; Japan; Canada; Egypt; Brazil; Norway; Greece; Kenya; India; Poland; Mexico; Portugal; China;
Sweden; Peru; Turkey; Austria; Chile; Ireland; Finland; Cuba; Germany; Thailand; Hungary
""")

TASKS = listed("""
boil an egg; learn a new language; sleep better; plant a tree; make a cup of tea; write a letter; save money;
clean a window; make new friends; cook rice; take a good photo; start running; train a puppy; paint a wall; bake
bread; remember names; prepare for an exam; wash a sweater; choose a good book; stay calm; grow tomatoes; pack a
suitcase; fix a flat tire; wrap a present; make a salad
""")

QUESTIONS = listed("""
Why is the sky blue?; What is photosynthesis?; How are you today?; Who are you?; What is gravity?; What should I
eat for breakfast?; Hello!; Good morning.; I am tired today.; I feel happy today.; What is a noun?; Thank you
for your help.; Can you help me with my homework?; What is the largest animal?; How many days are in a week?;
What color is grass?; What is the opposite of hot?; Why do we need water?; How do airplanes fly?; What is a
poem?; What is your favorite color?; I lost my keys.; What do cows eat?; How old is the Earth?; What is a good
gift for a friend?; What is an atom?; Why do leaves fall?; What makes a good teacher?; How does a battery work?;
What is snow made of?; Recommend a hobby.; Give me some advice.; I am learning to cook.; What is a democracy?;
Where do penguins live?; What is the fastest animal?; How do plants grow?; What is electricity?; Name three
fruits.; What is a healthy meal?
""")

UNSEEN = (
    "What is the capital of France?",
    "Tell me about the sea.",
    "How do I make pancakes?",
    "What is a computer program?",
    "Why do cats sleep so much?",
    "Give me a fact about dragons.",
    "What is the sun?",
    "I am going on a holiday tomorrow.",
    "Tell me about the history of ships.",
    "How can I become a better writer?",
    "What is friendship?",
    "Why is exercise good for us?",
)


def training() -> list[str]:
    """Every training prompt, shuffled, always in the same order."""
    prompts = [wording.format(topic) for topic in TOPICS for wording in TOPIC_WORDINGS]
    prompts += [f"What is the capital of {country}?" for country in COUNTRIES]
    prompts += [f"How do I {task}?" for task in TASKS]
    prompts += QUESTIONS
    return random.Random(SEED).sample(prompts, len(prompts))


def unseen() -> list[str]:
    """The prompts that no adapter was trained on."""
    return list(UNSEEN)
