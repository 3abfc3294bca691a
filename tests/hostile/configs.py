"""Configurations with every key out of range, and JSON that is none."""

from typing import Any

from tests.hostile import good
from tests.hostile.attack import Attack, Attacks

HUGE = 10**400
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"
GOOD = good.config()
GONE: Any = object()


def _sent(raw: bytes, *words: str) -> Attack:
    return Attack(
        400, "invalid_adapter", words or ("adapter_config.json",), lambda s: good.two_files(raw, good.weights(s.base))
    )


def _changed(key: str, value: Any) -> Attack:
    if value is GONE:
        return _sent(GOOD.replace(f'"{key}": '.encode(), f'"_{key}": '.encode()), f"{key}: missing", f"_{key}: unknown")
    return _sent(good.config(**{key: value}), key)


OUT_OF_RANGE: dict[str, list[Any]] = {
    "peft_type": ["LORAX", 1, None, GONE, ["PERFT"]],
    "format_version": [0, 2, True, 1.0, "1", None, GONE, HUGE],
    "base_model_name_or_path": [7, None, GONE, {}],
    "base_fingerprint": ["a" * 63, "a" * 65, "g" * 64, "a" * 64 + "\n", 1],
    "variant": ["X", "r", "", None, GONE, ["R"]],
    "expert_type": ["LoRA", None, GONE, 1],
    "bottleneck": [0, -1, 1025, True, 4.0, "4", None, GONE, HUGE],
    "alpha": [0, -1, 65536.5, True, "8", None, HUGE, float("nan"), float("inf"), float("-inf")],
    "activation": ["swish", "silu", 1],
    "num_experts": [0, -1, 1025, True, 4.0, "4", None, GONE, HUGE],
    "top_k": [0, -1, 3, True, 1.0, "1", None],
    "renormalize": [0, 1, "true", None],
    "gate_weight": ["base", None, 1],
    "layers": [[], [1, 0], [0, 0], 0, "0", {"0": 1}, [-1], [65536], [True], [1.0], ["1"], [None], [HUGE], [9999]],
    "description": ["x" * 1025, 3, None, ["x"]],
}

RAW: Attacks = {
    "empty": _sent(b"", "not JSON"),
    "a list": _sent(b"[]", "expected an object"),
    "null": _sent(b"null", "expected an object"),
    "a string": _sent(b'"R"', "expected an object"),
    "not UTF-8": _sent(GOOD.replace(b"tiny", b"t\xe9ny"), "not UTF-8"),
    "UTF-16": _sent(GOOD.decode().encode("utf-16"), "not UTF-8"),
    "two byte order marks": _sent(b"\xef\xbb\xbf" * 2 + GOOD, "not JSON"),
    "UTF-16 without a mark": _sent(GOOD.decode().encode("utf-16-le"), "text in UTF-16: save it as UTF-8"),
    "UTF-32": _sent(GOOD.decode().encode("utf-32"), "text in UTF-32: save it as UTF-8"),
    "HTML": _sent(b"<!DOCTYPE html><html><body>404</body></html>", "found an HTML page"),
    "a Git LFS pointer": _sent(LFS, "found a Git LFS pointer", "git lfs pull"),
    "YAML": _sent(b"# mine\npeft_type: PERFT\nvariant: R\n", "found YAML", "as JSON"),
    "a download's error": _sent(b"Entry not found", "found text ('Entry not found')"),
    "the weights": Attack(
        400,
        "invalid_adapter",
        ("found a safetensors file", "are the files swapped", "are 'config' and 'weights' swapped"),
        lambda s: good.two_files(good.weights(s.base)[:60_000], good.config()),
    ),
    "the weights, over the config's limit": Attack(
        400,
        "invalid_adapter",
        ("found more than 131072 bytes, a safetensors file",),
        lambda s: good.two_files(good.weights(s.base)[:100] + bytes(200_000), good.config()),
    ),
    "another method": _sent(
        b'{"peft_type": "IA3", "target_modules": ["k"], "feedforward_modules": null}',
        "peft_type: found 'IA3' (IA3, scaled activations",
        "target_modules: unknown key",
    ),
    "two objects": _sent(GOOD + GOOD, "not JSON"),
    "trailing comma": _sent(GOOD[:-1] + b",}", "not JSON"),
    "python": _sent(b"__import__('os').system('id')", "not JSON"),
    "pickle": _sent(b"\x80\x04\x95cos\nsystem\n", "not UTF-8"),
    "duplicate key": _sent(b'{"top_k": 2,' + GOOD[1:], "duplicate key 'top_k'"),
    "escaped duplicate key": _sent(b'{"t\\u006fp_k": 2,' + GOOD[1:], "duplicate key 'top_k'"),
    "half a surrogate pair": _sent(GOOD.replace(b"tiny", b"\\ud800"), "surrogate"),
    "NaN in a list": _sent(GOOD[:-1] + b', "layers": [NaN]}', "NaN"),
    "1e999": _sent(GOOD.replace(b"4.0", b"1e999"), "alpha"),
    "5,000 digits": _sent(GOOD.replace(b"4.0", b"9" * 5000), "not JSON"),
    "deep lists": _sent(b"[" * 30_000 + b"]" * 30_000, "nested too deeply"),
    "deep objects": _sent(b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "nested too deeply"),
    "deep inside a key": _sent(GOOD[:-1] + b', "description": ' + b"[" * 9000 + b"]" * 9000 + b"}", "too deeply"),
    "one byte too many": _sent(GOOD + b" " * (65537 - len(GOOD)), "found 65537 bytes, expected at most 65536"),
    "a megabyte": _sent(GOOD + b" " * 1_000_000, "expected at most 65536"),
    "thousands of unknown keys": _sent(GOOD[:-1] + b"".join(b',"k%d":1' % i for i in range(4000)) + b"}", "k3999: unk"),
    "a key of 60,000 characters": _sent(GOOD[:-1] + b', "' + b"x" * 60_000 + b'": 1}', "unknown key"),
    "a key with a newline": _sent(GOOD[:-1] + b', "a\\n  - forged": 1}', "unknown key"),
    "a template": _sent(GOOD[:-1] + b', "chat_template": "{{ x }}"}', "chat_template: unknown key"),
    "code": _sent(GOOD[:-1] + b', "auto_map": {"AutoModel": "evil.Model"}}', "auto_map: unknown key"),
}

ATTACKS: Attacks = {
    f"config: {key} = {'missing' if value is GONE else repr(value)[:40]}": _changed(key, value)
    for key, cases in OUT_OF_RANGE.items()
    for value in cases
} | {f"config: {kind}": attack for kind, attack in RAW.items()}
