"""Names of every bad kind, on an adapter that is sound."""

from tests.hostile import good
from tests.hostile.attack import Attack, Attacks, Setting, Upload


def _named(name: bytes | str, words: str = "name") -> Attack:
    raw = name.encode() if isinstance(name, str) else name

    def make(setting: Setting) -> Upload:
        return good.two_files(*good.files(setting).values(), name=raw)

    return Attack(400, "invalid_name", (words,), make)


def _the_bases_name(setting: Setting) -> Upload:
    return good.two_files(*good.files(setting).values(), name=setting.base_name.encode())


BAD: dict[str, bytes | str] = {
    "empty": "",
    "blank": " ",
    "64 characters": "a" * 64,
    "a kilobyte": "a" * 1024,
    "a megabyte": "a" * 1_000_000,
    "upper case": "Poet",
    "slash": "a/b",
    "backslash": "a\\b",
    "dot": ".",
    "dot dot": "..",
    "climbing": "../../etc/passwd",
    "absolute": "/etc/passwd",
    "dot first": ".poet",
    "dash first": "-poet",
    "underscore first": "_poet",
    "version": "poet@1",
    "colon": "poet:1",
    "percent": "poet%2f",
    "space inside": "poet one",
    "space behind": "poet ",
    "tab": "poet\t",
    "newline behind": "poet\n",
    "carriage return": "poet\rx",
    "forged log line": "poet\nadmin deleted everything",
    "NUL": "poet\0",
    "escape sequence": "\x1b[2Jpoet",
    "Cyrillic look-alike": "p\u043eet",
    "full width": "\uff50oet",
    "Kelvin sign": "\u212aate",
    "superscript digit": "poet\u00b2",
    "Arabic digit": "poet\u0661",
    "combining accent": "poe\u0301t",
    "right-to-left": "\u202etoep",
    "zero width": "po\u200bet",
    "byte order mark": "\ufeffpoet",
    "emoji": "\U0001f600",
    "not UTF-8": b"po\xffet",
    "overlong UTF-8": b"..\xc0\xafpoet",
    "surrogate": b"po\xed\xa0\x80et",
    "quote": 'poet"',
    "markup": "<script>",
    "wildcard": "*",
}

ATTACKS: Attacks = {f"name: {kind}": _named(name) for kind, name in BAD.items()} | {
    "name: the base's": Attack(409, "name_conflict", ("base model's served name",), _the_bases_name)
}
