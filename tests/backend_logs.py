"""What a GPU plugin of JAX logs where there is no GPU, which is not what a script says."""

import re


def without_backend_logs(text: str) -> str:
    return re.sub(r"^(WARNING: All log messages before absl|[IWE]\d{4} ).*\n?", "", text, flags=re.MULTILINE)
