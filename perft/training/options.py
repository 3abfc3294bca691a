"""Owns what a training can be told: every option once, for the command line, the file of --config and Python.

Defaults are the paper's (docs/method.md) where it has one. None stands for a default that depends on the base, the
device or the length of the training; `perft.training.run` fills it in and tells which.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from perft.config import Activation, ExpertType, GateWeight, Variant
from perft.errors import InputError
from perft.training.settings_file import read_settings

Method = Literal["perft", "qvlora", "router-lora"]
Share = Annotated[float, Field(ge=0, lt=1)]
Layer = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Small = Annotated[int, Field(ge=1, le=65_536)]
NotNegative = Annotated[float, Field(ge=0)]

OUTPUT_OPTIONS = ("output", "base_name", "description", "keep_checkpoints", "overwrite")
"""Options that change nothing of what is learned: a training is resumed even if they differ."""
FOR_PERFT = (
    "variant", "num_experts", "top_k", "expert_type", "activation", "renormalize", "gate_weight", "layers",
    "initial_up", "init",
)  # fmt: skip
"""Options that a baseline does not have."""
SHOWN = 100
"""Characters of a wrong value that a message repeats."""


class TrainOptions(BaseModel):
    """The options of one training. The names are the flags, with `_` for `-`."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    base: str = Field(description="the base model: a folder, or a name on the Hugging Face hub")
    data: tuple[Path, ...] = Field(min_length=1, description="files of examples (.jsonl or .json)")
    output: Path = Field(description="the folder to write the adapter into")

    method: Method = Field("perft", description="perft, or a baseline made with PEFT: qvlora, router-lora")
    variant: Variant = Field("R", description="R: own router, E: the base's router, D: all on, S: one, always on")
    num_experts: Count | None = Field(None, description="PEFT experts M (default: R 4, D 2, S 1, E the base's)")
    top_k: Count | None = Field(None, description="PEFT experts that a token uses, R only (default: 2)")
    bottleneck: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="D_B of a PEFT expert; the rank of a LoRA")
    expert_type: ExpertType = Field("lora", description="lora or parallel (two layers with an activation)")
    alpha: Annotated[float, Field(gt=0)] | None = Field(None, description="scale = alpha / bottleneck (default: 2 B)")
    activation: Activation | None = Field(None, description="of parallel experts (default: silu)")
    renormalize: bool | None = Field(None, description="R: divide the selected weights by their sum (default: as the "
                                                       "base does with its own)")  # fmt: skip
    gate_weight: GateWeight | None = Field(None, description="R: weigh the selected experts by the adapter's router "
                                                             "(adapter), or by the base's, as the authors' code for "
                                                             "OLMoE does (base_slot; default: adapter)")  # fmt: skip
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, min_length=1, description="decoder layers (default: every MoE layer)"
    )
    init: Path | None = Field(None, description="begin with the weights of this adapter, of the same configuration")
    initial_up: NotNegative = Field(
        0.0, description="std of the up projections at the start; the paper's code has 1e-6"
    )
    base_name: str | None = Field(None, description="how the adapter's config names the base (default: --base)")
    description: str | None = Field(None, max_length=1024, description="what the adapter is for, kept in its config")

    validation: tuple[Path, ...] = Field((), description="files of held-out examples (default: a part of --data)")
    validation_size: Annotated[int, Field(ge=0)] = Field(120, description="examples held out of --data, at most a "
                                                                         "tenth of it; 0: none")  # fmt: skip
    template: Literal["auto", "chat", "alpaca"] = Field("auto", description="the prompt: chat where the base has a "
                                                                           "chat template, else alpaca")  # fmt: skip
    loss_on: Literal["all", "answer"] = Field(
        "all", description="tokens to learn: all (the paper) or the answers' only"
    )
    max_length: Annotated[int, Field(ge=8, le=1_000_000)] = Field(256, description="tokens of an example")
    long_rows: Literal["error", "truncate", "skip"] = Field("error", description="what to do with longer examples")

    epochs: Annotated[float, Field(gt=0, le=100_000)] = Field(3.0, description="passes over the data")
    steps: Count | None = Field(None, description="optimizer steps, instead of --epochs")
    batch_size: Small = Field(16, description="examples of one step on one device, at most all there are")
    gradient_accumulation: Small = Field(1, description="batches that one step adds up")
    learning_rate: Annotated[float, Field(gt=0, lt=1000)] | None = Field(
        None, description="default: 1e-5 for OLMoE, else 2e-5"
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(None, description="default: 100, at most a tenth of all")
    weight_decay: NotNegative = Field(0.0, description="of AdamW")
    max_grad_norm: NotNegative = Field(1.0, description="gradients are clipped to this norm; 0: not")
    dropout: Share = Field(0.05, description="on an expert's input (lora) or hidden width (parallel)")
    aux_loss: NotNegative | None = Field(None, description="coefficient of the routers' load-balancing loss "
                                                           "(default: 0.02 for Mixtral, else 0.01)")  # fmt: skip
    base_aux_loss: bool = Field(True, description="of the base's routers too, as in the paper")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        42, description="of the initial weights, the order of the data and dropout"
    )

    evaluate_every: Count | None = Field(None, description="steps between two looks at the held-out part (default: "
                                                           "a tenth of all)")  # fmt: skip
    patience: Count | None = Field(None, description="stop after so many looks without a lower held-out loss")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the base while training (default: bfloat16 on a GPU, else float32)"
    )
    save_dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the adapter's file")
    gradient_checkpointing: bool | None = Field(None, description="less memory, more time (default: on a GPU)")
    threads: Annotated[int, Field(ge=1, le=1024)] | None = Field(None, description="CPU threads")
    keep_checkpoints: bool = Field(False, description="leave OUTPUT/checkpoints in place at the end")
    overwrite: bool = Field(False, description="replace an adapter that is in OUTPUT, and begin anew")

    @model_validator(mode="before")
    @classmethod
    def _check_flags(cls, values: Any) -> Any:
        """A file may say `true` where a number is expected, which would count as 1."""
        for key, value in values.items() if isinstance(values, Mapping) else ():
            field = cls.model_fields.get(key)
            given = value if isinstance(value, list | tuple) else [value]
            if field is not None and bool not in (field.annotation, *get_args(field.annotation)):
                wrong = next((each for each in given if isinstance(each, bool)), None)
                if wrong is not None:
                    raise ValueError(f"{key}: found {str(wrong).lower()}, expected another value than true or false")
        return values

    @model_validator(mode="after")
    def _check_rules(self) -> "TrainOptions":
        foreign = [key for key in FOR_PERFT if key in self.model_fields_set and getattr(self, key) is not None]
        if self.method != "perft" and foreign:
            raise ValueError(f"{foreign[0]}: --method {self.method} has no such option: leave it out")
        if {"steps", "epochs"} <= self.model_fields_set and self.steps is not None:
            raise ValueError("steps: found beside epochs: give one of them")
        if self.patience is not None and not self.validation and not self.validation_size:
            raise ValueError("patience: found without held-out examples, expected --validation or --validation-size")
        if same := {file.resolve() for file in self.data} & {file.resolve() for file in self.validation}:
            raise ValueError(f"validation: found {same.pop()} among --data too, expected other examples")
        if self.variant != "R" and self.method == "perft":
            for key in ("top_k", "renormalize", "gate_weight"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"{key}: found {getattr(self, key)}, but it is for variant R and this is {self.variant}"
                    )
        if self.expert_type == "parallel" and self.alpha is not None:
            raise ValueError("alpha: parallel experts have no scale: leave it out")
        if self.expert_type == "lora" and self.activation is not None:
            raise ValueError("activation: it is for --expert-type parallel")
        return self

    def learned_from(self) -> dict[str, Any]:
        """The options that change what is learned, as JSON values."""
        return self.model_dump(mode="json", exclude=set(OUTPUT_OPTIONS))


def read_options(given: Mapping[str, Any], file: Path | None = None) -> TrainOptions:
    """Options from a file (YAML or JSON) and those `given`, which win. Raises InputError with every problem."""
    values = {**(_from_file(file) if file is not None else {}), **given}
    try:
        return TrainOptions.model_validate(values)
    except ValidationError as error:
        raise InputError("the options are not valid", [problem_of(each) for each in error.errors()]) from None


def _from_file(file: Path) -> dict[str, Any]:
    values = {str(key).replace("-", "_"): value for key, value in read_settings(file).items()}
    for key in ("data", "validation"):
        if isinstance(values.get(key), str):
            values[key] = [values[key]]
    return values


def problem_of(error: Any) -> str:
    """One of pydantic's errors as a line: the option, what was found, what is wrong with it."""
    name = "--" + ".".join(str(part) for part in error["loc"][:1]).replace("_", "-") if error["loc"] else ""
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{name}: missing"
    if error["type"] == "extra_forbidden":
        return f"{name}: there is no such option"
    found = repr(error["input"])
    found = found if len(found) <= SHOWN else f"{found[:SHOWN]}..."
    return f"{name}: found {found}: {message}" if name else message


def command_line() -> str:
    """How this process was started, for the card. Secrets are not among a training's options."""
    import shlex

    return shlex.join(["perft", *sys.argv[1:]])
