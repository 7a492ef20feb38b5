"""What a judge is told and how it samples, as the wire contract spells it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["input_text", "output_text"]
    text: str


class ImagePart(_Strict):
    type: Literal["input_image"]
    image_url: Annotated[str, Field(min_length=1)]
    """A template of an https or data URL. The judge fetches it, we do not."""
    detail: Literal["auto", "low", "high"] = "auto"


class Audio(_Strict):
    data: Annotated[str, Field(min_length=1)]
    """A template of base64."""
    format: Literal["mp3", "wav"]


class AudioPart(_Strict):
    type: Literal["input_audio"]
    input_audio: Audio


class JudgeMessage(_Strict):
    """What a judge is told; every text is a template. `content` may be sent as a text, a part or a list of parts."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[list[Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]], Field(min_length=1, max_length=64)]

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [{"type": "input_text", "text": value}]
        return [value] if isinstance(value, dict) else value


class SamplingParams(_Strict):
    """What is left out is left to the judge's server."""

    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_completions_tokens: Annotated[int, Field(ge=1)] | None = None
    """The contract's spelling; sent as `max_completion_tokens`."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
