"""Owns one training from options to the adapter's folder.

    from perft.training.run import train
    result = train(read_options({"base": ..., "data": [...], "output": ...}))

Invariant: OUTPUT holds the two files of an adapter only once it is complete; until then there are checkpoints alone,
from which the same command goes on.
"""

import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from perft.config import AdapterConfig
from perft.errors import InputError
from perft.hf import PerftAdapter, TrainableAdapter, attach, load, moe_blocks
from perft.hf.base import load_config, load_model, load_tokenizer, shape_on_meta
from perft.hf.files import write_folder
from perft.training import output
from perft.training.baselines import save_baseline, with_baseline
from perft.training.card import Card, described
from perft.training.data import Example, read_examples
from perft.training.encoding import Encoded, encode_all, template_of
from perft.training.load_balance import BaseRouters
from perft.training.options import TrainOptions
from perft.training.order import OrderedExamples, collated
from perft.training.plan import DTYPES, Plan, adapter_config_of, plan_of, without_fingerprint
from perft.training.scoring import Score
from perft.training.trainer import AdapterTrainer, is_finite


@dataclass(frozen=True)
class Result:
    """What came out. before, after: on the held-out examples; None without any. seconds: of training, those before a
    kill too. is_main: of several processes the one that writes."""

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
    is_main = int(os.environ.get("RANK", "0")) == 0
    if not is_main:
        with _repeatable():
            return _train(options, lambda line: None, is_main=False)
    with output.made(options), _repeatable():
        return _train(options, say, is_main=True)


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


def _train(options: TrainOptions, say: Callable[[str], None], is_main: bool) -> Result:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    config = load_config(options.base)
    shape = shape_on_meta(config)
    adapter_config = adapter_config_of(options, config, shape)
    tokenizer = load_tokenizer(options.base)
    encoded, held_out, template = _encoded(options, tokenizer, *_examples(options), say)
    plan = plan_of(options, config, len(encoded))
    say(
        f"{len(encoded)} examples ({template} template), {len(held_out)} held out; {plan.steps} steps of "
        f"{plan.examples_a_step}, learning rate {plan.learning_rate:g}, warm-up {plan.warm_up}"
    )
    say(f"loading {options.base}")
    model = load_model(options.base, plan.dtype)
    routers = BaseRouters(moe_blocks(model), shape.top_k) if plan.aux_loss and options.base_aux_loss else None
    trainee, adapter = _trainee(options, model, adapter_config)
    trainer = _trainer(options, plan, trainee, adapter, routers, encoded, held_out, tokenizer.pad_token_id)
    checkpoint = output.claim(options, say) if is_main else None
    (checkpoint,) = broadcast_object_list([checkpoint])
    before = trainer.score() if held_out else None
    if before is not None:
        say(f"before: held-out loss {before.loss:.4f}, answers right {before.right} of {before.examples}")
    if checkpoint is not None:
        say(f"going on from {checkpoint}")
    _run(trainer, checkpoint)
    if not is_finite(trainee):
        raise InputError("the adapter's weights are not finite: lower --learning-rate, or train with --dtype float32")
    _round_to_saved(trainee, DTYPES[options.save_dtype])
    after = trainer.score() if held_out else None
    if after is not None and before is not None:
        say(f"after: held-out loss {after.loss:.4f}, answers right {after.right} of {after.examples}")
        if after.loss > before.loss:
            say("the adapter is worse than the base on the held-out examples: more steps, or another --learning-rate")
    result = Result(options.output, before, after, trainer.seconds(), trainer.state.global_step, is_main)
    if is_main:
        card = Card(
            options=options, plan=plan, template=template, config=adapter_config, examples=len(encoded),
            parameters=sum(each.numel() for each in trainee.parameters() if each.requires_grad),
            seconds=result.seconds, steps=result.steps, best_step=trainer.state.best_global_step if held_out else None,
            before=before, after=after, history=trainer.state.log_history,
        )  # fmt: skip
        _write(options, adapter, trainee, adapter_config, card)
    return result


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
    options: TrainOptions, tokenizer: Any, examples: Sequence[Example], held_out: Sequence[Example],
    say: Callable[[str], None],
) -> tuple[list[Encoded], list[Encoded], str]:  # fmt: skip
    """What is held out is scored on its answers alone."""
    template = template_of(tokenizer, options.template)
    limits = (options.max_length, options.long_rows)
    encoded = encode_all(tokenizer, examples, template, options.loss_on, *limits)
    held = encode_all(tokenizer, held_out, template, "answer", *limits) if held_out else []
    if skipped := len(examples) + len(held_out) - len(encoded) - len(held):
        say(f"{skipped} examples of more than {options.max_length} tokens are skipped")
    return encoded, held, template


def _run(trainer: AdapterTrainer, checkpoint: Path | None) -> None:
    """Train. A checkpoint that cannot be written, or read, is an InputError: the libraries wrap the system's error."""
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except pickle.UnpicklingError as error:
        raise InputError(f"{checkpoint} is damaged: remove it, or begin anew with --overwrite ({error})") from None
    except (SafetensorError, RuntimeError) as error:
        if "PytorchStreamReader" in str(error):
            raise InputError(f"{checkpoint} is damaged: remove it, or begin anew with --overwrite") from None
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
    adapter = attach(model, without_fingerprint(adapter_config), options.dropout, options.initial_up)
    if options.init is not None:
        try:
            load(adapter, options.init)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"--init: {error}") from None
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
        output_dir=str(options.output / output.FOLDER), max_steps=plan.steps, per_device_train_batch_size=plan.batch,
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
    options: TrainOptions, adapter: PerftAdapter | None, trainee: Any, adapter_config: AdapterConfig | None, card: Card
) -> None:
    """The card first, the adapter last; then the checkpoints go."""
    (options.output / output.CARD_FILE).write_text(described(card), encoding="utf-8")
    if adapter is not None and adapter_config is not None:
        dtype = DTYPES[options.save_dtype]
        tensors = {name: tensor.cpu().to(dtype) for name, tensor in adapter.tensors().items()}
        write_folder(options.output, adapter_config, tensors)
    else:
        save_baseline(trainee, options.output, described(card))
    if not options.keep_checkpoints:
        shutil.rmtree(options.output / output.FOLDER, ignore_errors=True)
