"""Settings of `tightfit quantize`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tightfit.cluster.errors import ConfigError
from tightfit.cluster.settings import Option
from tightfit.workers.model_formats import AUTO

METHODS = ("rtn", "hqq", "gptq")


def _group_size(text: str) -> int | None:
    if text == AUTO:
        return None
    if text == "channel":
        return 0
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{text!r} is neither a number of features, nor {AUTO} or channel")
    return int(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig:
    """Everything that `tightfit quantize` can be told."""

    model: Annotated[str, Option("Checkpoint directory, GGUF file, or hub name (org/name).")]
    out: Annotated[str, Option("Directory to write; what an interrupted run left is kept.")]
    format: Annotated[
        str | None,
        Option("Of the layers' weights; default: int4.", choices=("int8", "int4", "int3")),
    ] = None
    budget: Annotated[
        float | None,
        Option(
            "Instead of one format the best mix of int3, int4 and int8 within so many bits per "
            "weight, scales and zero points included; by the sensitivities of the layers.",
            at_least=0,
        ),
    ] = None
    sensitivity: Annotated[
        str | None,
        Option(
            "File of sensitivities that budget goes by; default: sensitivity.json in OUT, which is "
            "measured first if there is none."
        ),
    ] = None
    measure: Annotated[
        bool,
        Option(
            "Write sensitivity.json in OUT, what each layer loses in each format, and no "
            "checkpoint."
        ),
    ] = False
    measure_tokens: Annotated[
        int,
        Option(
            "Tokens at the end of the calibration text that sensitivities are measured on; gptq "
            "does not see them.",
            at_least=32,
        ),
    ] = 1024
    group_size: Annotated[
        str,
        Option(
            "Input features that share a scale in int4 and int3: a number, channel (all of an "
            "output channel), or auto (128, or 64 or 32 where those divide all layers' widths).",
            check=_group_size,
        ),
    ] = AUTO
    method: Annotated[
        str,
        Option(
            "How int4 and int3 are rounded: rtn (to nearest), hqq (fitted to the weights; read by "
            "Tightfit only), gptq (for the inputs that a calibration text gives), or auto (gptq "
            "where there is a text, else rtn).",
            choices=(AUTO, *METHODS),
        ),
    ] = AUTO
    calibration: Annotated[
        str | None,
        Option("Text file like what the model will be used for; gptq and measuring need it."),
    ] = None
    samples: Annotated[int, Option("Pieces of the text that gptq takes.", at_least=1)] = 128
    sample_tokens: Annotated[
        int, Option("Tokens of each, at most the model's context.", at_least=2)
    ] = 2048
    sample_choice: Annotated[
        str,
        Option(
            "Which pieces of a long text: spread (at equal distances), or by their distance to "
            "prototypes in the space of the model's embeddings: easy (near) or hard (far).",
            choices=("spread", "easy", "hard"),
        ),
    ] = "spread"
    damping: Annotated[
        float,
        Option("Share of the Hessian's mean diagonal that gptq adds to it.", at_least=0),
    ] = 0.01
    act_order: Annotated[bool, Option("gptq rounds the input features that matter most first.")] = (
        True
    )

    def __post_init__(self) -> None:
        """Raises ConfigError where settings do not go together."""
        for name, other, remedy in (
            ("budget", "format", "give one of them"),
            ("budget", "measure", "leave measure out: what is missing is measured first"),
            ("measure", "format", "leave format out: all formats are measured"),
            ("measure", "sensitivity", "leave sensitivity out: it is what is measured"),
        ):
            if self._has(name) and self._has(other):
                raise ConfigError(
                    f"quantize.{name} and quantize.{other} exclude each other: {remedy}"
                )
        if self.sensitivity is not None and self.budget is None:
            raise ConfigError("quantize.sensitivity is for quantize.budget, which is missing")
        if self.measure and self.calibration is None:
            raise ConfigError(
                "quantize.calibration is missing: quantize.measure measures on the end of a text"
            )

    def _has(self, name: str) -> bool:
        return getattr(self, name) not in (None, False)

    @property
    def uniform_format(self) -> str:
        """Of all layers, where there is no budget."""
        return self.format or "int4"

    @property
    def group_features(self) -> int | None:
        """As a number: None is auto, 0 a whole channel."""
        return _group_size(self.group_size)
