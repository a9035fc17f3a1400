"""How a checkpoint is served."""

import re
from dataclasses import dataclass

from gcompute.config.fields import check_choices, check_numbers, option
from gcompute.config.mesh import MeshShape
from gcompute.config.train import AUTO, PRECISIONS

POSITIVE = (
    "slots",
    "max_queue",
    "max_context",
    "decode_steps",
    "page",
    "chunk",
    "token_budget",
    "kv_tokens",
    "draft_tokens",
    "draft_batch",
    "timeout_s",
    "max_body_bytes",
    "keep_alive_s",
    "read_timeout_s",
    "max_connections",
)
ORIGIN = re.compile(r"https?://[^/\s,]+")
PREEMPTIONS = ("recompute", "swap")
QUANTIZED = ("int8",)
SPECULATIONS = ("none", "ngram", "draft")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """The engine's size and the address it answers on."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    slots: int = option(8, "requests decoded together")
    max_queue: int = option(64, "requests that may wait; more are answered 429")
    max_context: int | None = option(None, "longest prompt plus output, in tokens (default: the model's context)")
    decode_steps: int = option(8, "most tokens decoded a dispatch")
    chunk: int = option(256, "most prompt tokens read a dispatch")
    token_budget: int = option(512, "most tokens, prompts' and decoding requests', between two decode dispatches")
    page: int = option(16, "tokens a page of keys and values")
    kv_tokens: int | None = option(
        None, "tokens that all pages hold (default: what all slots need, or what the device's memory leaves)"
    )
    prefix_cache: bool = option(True, "keep pages of ended requests, to be found by requests that begin alike")
    preemption: str = option(
        "recompute", "when pages run out, read a request again later or keep its pages on the host", choices=PREEMPTIONS
    )
    speculate: str = option(
        "none",
        "propose tokens that are judged together: by n-gram lookup, or by the model of --draft",
        choices=SPECULATIONS,
    )
    draft_tokens: int = option(4, "tokens proposed at a time")
    draft_batch: int = option(8, "most requests that speculate together; beyond it, plain decoding")
    deterministic: bool = option(False, "the same bits whatever else runs, at a cost in speed")
    timeout_s: float | None = option(None, "longest that a call may take, in seconds (default: no limit)")
    max_body_bytes: int = option(4 << 20, "largest request body; larger ones are answered 413")
    keep_alive_s: int = option(75, "seconds that an idle connection is kept, longer than clients' pools keep theirs")
    read_timeout_s: float = option(60.0, "seconds in which a client sends its request whole, and takes what is ready")
    max_connections: int | None = option(
        None, "most open connections (default: 4,096, or what the limit on open files leaves)"
    )
    allow_origin: str = option(
        "", "web origins whose pages may call this server, as in https://a.example,http://localhost:3000; * for all"
    )
    precision: str = option(
        AUTO,
        "dtype of matmul operands (auto: bfloat16, or float32 on a CPU that is slower with it)",
        choices=(AUTO, *PRECISIONS),
    )
    weights: str | None = option(
        None, "dtype that matmul weights are kept in (default: the precision)", choices=QUANTIZED
    )
    kv: str | None = option(None, "dtype that keys and values are kept in (default: the precision)", choices=QUANTIZED)
    mesh: MeshShape | None = option(None, "mesh axes, such as tensor=2 or data=2,expert=4 (default: one device)")

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins of `allow_origin`."""
        return tuple(one.strip().rstrip("/") for one in self.allow_origin.split(",") if one.strip())

    def __post_init__(self) -> None:
        check_choices(self)
        for one in self.origins:
            if one != "*" and not ORIGIN.fullmatch(one):
                raise ValueError(f"allow_origin={one!r} is no origin: give scheme://host or scheme://host:port, or *.")
        check_numbers(self, positive=POSITIVE, at_least_zero=("port",))
        if self.port > 65535:
            raise ValueError(f"port must be below 65536, got {self.port}.")
        if self.chunk % self.page:
            raise ValueError(f"chunk={self.chunk} must be a multiple of page={self.page}.")
        if self.deterministic and self.speculate != "none":
            raise ValueError("deterministic and speculate exclude each other: what is proposed changes the programs.")
