"""How a checkpoint is served."""

from dataclasses import dataclass

from gcompute.config.fields import check_choices, check_numbers, option
from gcompute.config.train import PRECISIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """The engine's size and the address it answers on."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    slots: int = option(8, "requests decoded together")
    max_queue: int = option(64, "requests that may wait; more are answered 429")
    max_context: int | None = option(None, "longest prompt plus output, in tokens (default: the model's context)")
    decode_steps: int = option(8, "most tokens decoded a dispatch")
    precision: str = option("bfloat16", "dtype of matmul operands and of the KV cache", choices=PRECISIONS)

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self, positive=("slots", "max_queue", "max_context", "decode_steps"), at_least_zero=("port",))
        if self.port > 65535:
            raise ValueError(f"port must be below 65536, got {self.port}.")
