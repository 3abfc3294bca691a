"""Owns one training from options to the adapter's folder.

    from perft.training.run import train
    result = train(read_options({"base": ..., "data": [...], "output": ...}))

Invariant: OUTPUT holds the two files of an adapter only once it is complete; until then there are checkpoints alone,
from which the same command goes on.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from perft.base_model import BaseShape, fit_violations
from perft.config import AdapterConfig
from perft.errors import InputError
from perft.hf import PerftAdapter, TrainableAdapter, attach, moe_blocks
from perft.hf.base import fingerprint_of, load_config, load_model, load_tokenizer, renormalizes, shape_on_meta
from perft.hf.files import CONFIG_FILE, WEIGHTS_FILE, write_folder
from perft.training.baselines import with_baseline
from perft.training.card import Card, described
from perft.training.checkpoints import FOLDER, claim
from perft.training.data import Example, read_examples
from perft.training.encoding import Encoded, encode_all, template_of
from perft.training.load_balance import BaseRouters
from perft.training.options import TrainOptions
from perft.training.order import OrderedExamples, collated
from perft.training.paper import defaults_of
from perft.training.scoring import Score
from perft.training.trainer import AdapterTrainer, is_finite, losses_of

CARD_FILE = "README.md"
LOOKS = 10
"""Times that the held-out part is looked at, unless --evaluate-every says otherwise."""
WARM_UP = 100
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Result:
    """What came out. before, after: on the held-out examples; None without any. is_main: of several processes the one
    that writes."""

    output: Path
    before: Score | None
    after: Score | None
    seconds: float
    steps: int
    is_main: bool = True


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def train(options: TrainOptions, say: Callable[[str], None] = say_on_stderr) -> Result:
    """Train one adapter and write it. Raises InputError, OSError (disk), or what PyTorch raises."""
    with _repeatable():
        return _train(options, say)


@contextmanager
def _repeatable() -> Iterator[None]:
    """On the CPU, no sum whose order depends on threads: the gradient of a base's own gathering is such a sum."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def _train(options: TrainOptions, say: Callable[[str], None]) -> Result:
    started = time.monotonic()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    is_main = int(os.environ.get("RANK", "0")) == 0
    tell = say if is_main else lambda line: None
    config = load_config(options.base)
    shape = shape_on_meta(config)
    adapter_config = _adapter_config(options, config, shape)
    examples, held_out = _examples(options)
    if is_main:
        _check_output(options)
    tokenizer = load_tokenizer(options.base)
    encoded, encoded_held_out, template = _encoded(options, tokenizer, examples, held_out)
    plan = _plan(options, config, len(encoded))
    tell(
        f"{len(encoded)} examples ({template} template), {len(encoded_held_out)} held out; {plan.steps} steps of "
        f"{plan.examples_a_step}, learning rate {plan.learning_rate:g}, warm-up {plan.warm_up}"
    )
    tell(f"loading {options.base}")
    model = load_model(options.base, plan.dtype)
    routers = BaseRouters(moe_blocks(model), shape.top_k) if plan.aux_loss and options.base_aux_loss else None
    trainee, adapter = _trainee(options, model, adapter_config)
    trainer = _trainer(options, plan, trainee, adapter, routers, encoded, encoded_held_out, tokenizer.pad_token_id)
    checkpoint = _checkpoint(options) if is_main else None
    (checkpoint,) = broadcast_object_list([checkpoint])
    before = trainer.score() if encoded_held_out else None
    if before is not None:
        tell(f"before: held-out loss {before.loss:.4f}, answers right {before.right} of {before.examples}")
    if checkpoint is not None:
        tell(f"going on from {checkpoint}")
    _run(trainer, checkpoint)
    if not is_finite(trainee):
        raise InputError("the adapter's weights are not finite: lower --learning-rate, or train with --dtype float32")
    _round_to_saved(trainee, DTYPES[options.save_dtype])
    after = trainer.score() if encoded_held_out else None
    if after is not None:
        tell(f"after: held-out loss {after.loss:.4f}, answers right {after.right} of {after.examples}")
    result = Result(options.output, before, after, time.monotonic() - started, trainer.state.global_step, is_main)
    if is_main:
        _write(options, trainer, adapter, trainee, adapter_config, result, len(encoded))
    return result


@dataclass(frozen=True)
class Plan:
    """The numbers that depend on the base, the device and the data."""

    steps: int
    batch: int
    accumulated: int
    devices: int
    learning_rate: float
    warm_up: int
    aux_loss: float
    evaluate_every: int
    dtype: torch.dtype
    gradient_checkpointing: bool

    @property
    def examples_a_step(self) -> int:
        return self.batch * self.accumulated * self.devices


def _plan(options: TrainOptions, config: Any, examples: int) -> Plan:
    devices, on_gpu, defaults = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available(), defaults_of(config)
    a_step = options.batch_size * options.gradient_accumulation * devices
    steps = options.steps or max(1, round(options.epochs * examples / a_step))
    dtype = DTYPES["bfloat16" if on_gpu else "float32"] if options.dtype == "auto" else DTYPES[options.dtype]
    return Plan(
        steps=steps,
        batch=options.batch_size,
        accumulated=options.gradient_accumulation,
        devices=devices,
        learning_rate=options.learning_rate or defaults.learning_rate,
        warm_up=min(WARM_UP, steps // 10) if options.warmup_steps is None else options.warmup_steps,
        aux_loss=defaults.aux_loss if options.aux_loss is None else options.aux_loss,
        evaluate_every=options.evaluate_every or max(1, steps // LOOKS),
        dtype=dtype,
        gradient_checkpointing=on_gpu if options.gradient_checkpointing is None else options.gradient_checkpointing,
    )


def _adapter_config(options: TrainOptions, config: Any, shape: BaseShape) -> AdapterConfig | None:
    """The adapter's configuration with every default; None for a baseline. Raises InputError if it does not fit."""
    if options.method != "perft":
        return None
    experts = options.num_experts or {"R": 4, "D": 2, "S": 1, "E": shape.num_experts}[options.variant]
    values: dict[str, Any] = {
        "base_model_name_or_path": options.base_name or options.base,
        "base_fingerprint": fingerprint_of(options.base, shape),
        "variant": options.variant, "expert_type": options.expert_type, "bottleneck": options.bottleneck,
        "num_experts": experts, "layers": options.layers, "description": options.description,
    }  # fmt: skip
    if options.expert_type == "lora":
        values["alpha"] = float(options.alpha or 2 * options.bottleneck)
    elif options.activation is not None:
        values["activation"] = options.activation
    if options.variant == "R":
        values["top_k"] = options.top_k or min(2, experts)
        values["renormalize"] = renormalizes(config) if options.renormalize is None else options.renormalize
    try:
        made = AdapterConfig.model_validate(values)
    except ValueError as error:
        raise InputError(f"the adapter's configuration is not valid: {error}") from None
    if violations := fit_violations(_without_fingerprint(made), shape):
        raise InputError(f"the adapter does not fit {options.base}", violations)
    return made


def _without_fingerprint(config: AdapterConfig) -> AdapterConfig:
    """The configuration without its fingerprint: the shape it is held to has no weights."""
    return config.model_copy(update={"base_fingerprint": None})


def _examples(options: TrainOptions) -> tuple[list[Example], list[Example]]:
    """The examples to learn, and those held out. Raises InputError."""
    examples = read_examples(options.data)
    if options.validation:
        return examples, read_examples(options.validation)
    size = min(options.validation_size, len(examples) // 10)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(options.seed)).tolist()
    held_out = set(order[:size])
    return (
        [example for number, example in enumerate(examples) if number not in held_out],
        [examples[number] for number in sorted(held_out)],
    )


def _encoded(
    options: TrainOptions, tokenizer: Any, examples: Sequence[Example], held_out: Sequence[Example]
) -> tuple[list[Encoded], list[Encoded], str]:
    """What is held out is scored on its answers alone."""
    template = template_of(tokenizer, options.template)
    limits = (options.max_length, options.long_rows)
    encoded = encode_all(tokenizer, examples, template, options.loss_on, *limits)
    held = encode_all(tokenizer, held_out, template, "answer", *limits) if held_out else []
    return encoded, held, template


def _check_output(options: TrainOptions) -> None:
    """Make the folder. Raises InputError if it holds an adapter, or cannot be written."""
    there = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if (options.output / name).exists()]
    if there and not options.overwrite:
        raise InputError(f"{options.output} has an adapter already: use another --output, or --overwrite")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        probe = options.output / ".perft-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write into {options.output}: {error.strerror}") from None


def _checkpoint(options: TrainOptions) -> str | None:
    found = claim(options.output, options)
    return None if found is None else str(found)


def _run(trainer: AdapterTrainer, checkpoint: str | None) -> None:
    """Train. A checkpoint that cannot be written is an InputError: safetensors and PyTorch wrap the system's error."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, SafetensorError) or "PytorchStreamWriter" in str(error):
            raise InputError(f"a checkpoint cannot be written into {trainer.args.output_dir}: {error}") from error
        raise


def _trainee(
    options: TrainOptions, model: Any, adapter_config: AdapterConfig | None
) -> tuple[Any, PerftAdapter | None]:
    """What the Trainer trains, and the PERFT adapter in it."""
    torch.manual_seed(options.seed)
    if adapter_config is None:
        return with_baseline(model, options), None
    adapter = attach(model, _without_fingerprint(adapter_config), options.dropout, options.initial_up)
    return TrainableAdapter(model, adapter), adapter


def _trainer(
    options: TrainOptions, plan: Plan, trainee: Any, adapter: PerftAdapter | None, routers: BaseRouters | None,
    encoded: Sequence[Encoded], held_out: Sequence[Encoded], pad: int,
) -> AdapterTrainer:  # fmt: skip
    from transformers import EarlyStoppingCallback, TrainingArguments

    looks: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "steps", "save_steps": plan.evaluate_every}
    if held_out:
        looks |= {
            "eval_strategy": "steps", "eval_steps": plan.evaluate_every, "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss", "greater_is_better": False,
        }  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(options.output / FOLDER), max_steps=plan.steps, per_device_train_batch_size=plan.batch,
        per_device_eval_batch_size=plan.batch, gradient_accumulation_steps=plan.accumulated,
        learning_rate=plan.learning_rate, warmup_steps=plan.warm_up, weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm, lr_scheduler_type="linear", optim="adamw_torch", seed=options.seed,
        gradient_checkpointing=plan.gradient_checkpointing, bf16=plan.dtype is torch.bfloat16,
        gradient_checkpointing_kwargs={"use_reentrant": False} if plan.gradient_checkpointing else None,
        train_sampling_strategy="sequential", remove_unused_columns=False, label_names=["labels"],
        logging_steps=max(1, plan.steps // 50), save_total_limit=2, report_to="none", log_level="error",
        disable_tqdm=True, use_cpu=not torch.cuda.is_available(), average_tokens_across_devices=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False, **looks,
    )  # fmt: skip
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs: accelerate launch, not threads of one process
    callbacks = [EarlyStoppingCallback(options.patience)] if options.patience and held_out else []
    return AdapterTrainer(
        trainee, arguments, aux_loss=plan.aux_loss, base_routers=routers, adapter=adapter, held_out=held_out, pad=pad,
        train_dataset=OrderedExamples(encoded, plan.examples_a_step, plan.steps, options.seed),
        eval_dataset=list(held_out) or None, data_collator=lambda rows: collated(rows, pad), callbacks=callbacks,
    )  # fmt: skip


@torch.no_grad()
def _round_to_saved(trainee: Any, dtype: torch.dtype) -> None:
    """What is scored at the end are the numbers that the file will hold."""
    for parameter in trainee.parameters():
        if parameter.requires_grad:
            parameter.copy_(parameter.to(dtype))


def _write(
    options: TrainOptions, trainer: AdapterTrainer, adapter: PerftAdapter | None, trainee: Any,
    adapter_config: AdapterConfig | None, result: Result, examples: int,
) -> None:  # fmt: skip
    """The card first, the adapter last; then the checkpoints go."""
    training, held_out = losses_of(trainer.state.log_history)
    if adapter is not None and adapter_config is not None:
        dtype = DTYPES[options.save_dtype]
        tensors = {name: tensor.cpu().to(dtype) for name, tensor in adapter.tensors().items()}
        trained = sum(tensor.numel() for tensor in tensors.values())
    else:
        tensors, trained = {}, sum(each.numel() for each in trainee.parameters() if each.requires_grad)
    card = Card(
        options=options, config=adapter_config, examples=examples, parameters=trained, seconds=result.seconds,
        steps=result.steps, before=result.before, after=result.after, losses=training, held_out=held_out,
    )  # fmt: skip
    (options.output / CARD_FILE).write_text(described(card), encoding="utf-8")
    if adapter_config is not None:
        write_folder(options.output, adapter_config, tensors)
    else:
        trainee.save_pretrained(options.output)
        (options.output / CARD_FILE).write_text(described(card), encoding="utf-8")  # PEFT writes one of its own
    if not options.keep_checkpoints:
        shutil.rmtree(options.output / FOLDER, ignore_errors=True)
