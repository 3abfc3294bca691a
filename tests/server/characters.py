"""A tiny model whose tokens are the printable characters: it can say JSON, which the words t0 ... t127 cannot."""

import string
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.server.tiny_server import CHAT_TEMPLATE

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def build_model(folder: Path, seed: int = 0) -> Path:
    tiny.build("mixtral", folder, seed)
    characters = [character for character in string.printable if character.isprintable() or character == "\n"]
    words = [*SPECIAL.values(), *characters]
    words += [f"<unused{number}>" for number in range(tiny.VOCABULARY - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {name: AddedToken(word, special=True) for name, word in SPECIAL.items()}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder
