"""How a checkpoint is served."""

from dataclasses import dataclass

from gcompute.config.fields import check_choices, check_numbers, option
from gcompute.config.train import PRECISIONS

POSITIVE = ("slots", "max_queue", "max_context", "decode_steps", "timeout_s", "max_body_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """The engine's size and the address it answers on."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    slots: int = option(8, "requests decoded together")
    max_queue: int = option(64, "requests that may wait; more are answered 429")
    max_context: int | None = option(None, "longest prompt plus output, in tokens (default: the model's context)")
    decode_steps: int = option(8, "most tokens decoded a dispatch")
    timeout_s: float | None = option(None, "longest that a call may take, in seconds (default: no limit)")
    max_body_bytes: int = option(4 << 20, "largest request body; larger ones are answered 413")
    precision: str = option("bfloat16", "dtype of matmul operands and of the KV cache", choices=PRECISIONS)

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self, positive=POSITIVE, at_least_zero=("port",))
        if self.port > 65535:
            raise ValueError(f"port must be below 65536, got {self.port}.")
