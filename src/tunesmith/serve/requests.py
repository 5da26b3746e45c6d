"""What a client may ask: OpenAI's requests, read strictly. What could not act is refused by name, never ignored.

Three kinds of fields are known beside those that act: some say nothing about the answer and are read over (IGNORED),
some are refused unless they ask for nothing (UNSUPPORTED), and templates are refused whatever they say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tunesmith.inference.sample import GenerationSettings

MOST_ANSWERS = 8  # n
MOST_PROMPTS = 32
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls",),
)
# field -> the values that ask for nothing
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "suffix": (None, ""),
    "echo": (None, False),
    "best_of": (None, 1),
}
TEMPLATES = ("chat_template", "chat_template_kwargs", "template", "add_generation_prompt", "continue_final_message")
OF_MESSAGES: dict[str, tuple[Any, ...]] = {
    "tool_calls": (None, []),
    "function_call": (None,),
    "refusal": (None,),
    "audio": (None,),
    "annotations": (None, []),
    "reasoning_content": (None,),
}


def _plain(value: Any, refused: Mapping[str, tuple[Any, ...]], ignored: tuple[str, ...]) -> Any:
    """The fields that act. Raises ValueError for one that cannot, and for a template."""
    if not isinstance(value, dict):
        return value
    for name in value:
        if name in TEMPLATES:
            raise ValueError(f"{name}: a template in a request is never used; each model has the one it was trained on")
        if name in refused and not _neutral(value[name], refused[name]):
            raise ValueError(f"{name}: not supported here; leave it out")
    return {name: each for name, each in value.items() if name not in refused and name not in ignored}


def _neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    return any(type(value) in (type(each), *_NUMBERS.get(type(each), ())) and value == each for each in neutral)


_NUMBERS: dict[type, tuple[type, ...]] = {int: (float,)}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """The image itself, as a data URL."""

    url: str = Field(description="data:image/png;base64,...; an address is refused, never fetched.")
    detail: Literal["auto", "low", "high"] | None = Field(default=None, description="Read over.")

    @model_validator(mode="after")
    def _inside(self) -> ImageUrl:
        if not self.url[:5].lower() == "data:":
            raise ValueError("image_url: give the image itself, data:image/png;base64,...; an address is never fetched")
        return self


class ImagePart(_Strict):
    """What a question is about."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(min_length=1)]
    name: str | None = Field(default=None, description="Read over: templates name roles only.")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        return _plain(value, OF_MESSAGES, ())

    @property
    def images(self) -> list[str]:
        """Its images, as data URLs."""
        parts = [] if isinstance(self.content, str) else self.content
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]

    def plain(self) -> dict[str, str]:
        """As a template reads it."""
        parts = [] if isinstance(self.content, str) else self.content
        spoken = "".join(part.text for part in parts if isinstance(part, TextPart))
        text = self.content if isinstance(self.content, str) else spoken
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    """What else is told in a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


Stop = Annotated[str, Field(min_length=1, max_length=1024)]


class _Sampling(_Strict):
    """What both routes share."""

    model: str = Field(max_length=1024, description="An adapter's name, the base's, or `base`.")
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1, le=1 << 31, description="Not OpenAI's.")
    min_p: float | None = Field(default=None, ge=0, le=1, description="Not OpenAI's.")
    repetition_penalty: float | None = Field(default=None, gt=0, le=10, description="Not OpenAI's.")
    n: int | None = Field(default=None, ge=1, le=MOST_ANSWERS)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=1 << 31)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        return _plain(value, UNSUPPORTED, IGNORED)

    @model_validator(mode="after")
    def _streamed(self) -> _Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: has no effect without stream; set stream to true, or leave it out")
        return self

    @property
    def answers(self) -> int:
        """How many for each prompt."""
        return self.n or 1

    @property
    def with_usage(self) -> bool:
        """Does a stream end with the usage?"""
        return bool(self.stream_options and self.stream_options.include_usage)

    def settings(self, tokens: int, temperature: float) -> GenerationSettings:
        """As the engine takes them; `tokens` and `temperature` where the request says nothing. Raises GenerationError.

        At temperature 0 the likeliest token is also the only one that any narrowing leaves, so that is left out.
        """
        heat = temperature if self.temperature is None else self.temperature
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return GenerationSettings(
            max_new_tokens=tokens,
            temperature=heat,
            top_k=self.top_k if heat else None,
            top_p=self.top_p if heat else None,
            min_p=self.min_p if heat else None,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            stop=stop,
            seed=None if self.seed is None else self.seed % (1 << 63),
        )


class ChatRequest(_Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1 << 31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens: differs from max_completion_tokens; give one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: has no effect without logprobs; set logprobs to true, or leave it out")
        if any(message.images and message.role != "user" for message in self.messages):
            raise ValueError("messages: an image belongs to a message of the user")
        if sum(len(message.images) for message in self.messages) > 1:
            raise ValueError("messages: a conversation is about one image; leave the others out")
        return self

    @property
    def image(self) -> str | None:
        """The image that the conversation is about, as a data URL."""
        return next((image for message in self.messages for image in message.images), None)

    def most(self, default: int) -> int:
        """The longest answer in tokens."""
        return self.max_completion_tokens or self.max_tokens or default


Ids = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]


class CompletionRequest(_Sampling):
    """POST /v1/completions: plain text or token ids, without a template."""

    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: int | None = Field(default=None, ge=0, le=20)

    def most(self) -> int:
        """The longest answer in tokens."""
        return self.max_tokens or COMPLETION_TOKENS

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[each for each in self.prompt if isinstance(each, int)]]
        return [each for each in self.prompt if not isinstance(each, int)]


class AdapterRequest(_Strict):
    """POST /v1/adapters: load this name from the server's folder of adapters, or load it anew."""

    name: str = Field(max_length=1024)
