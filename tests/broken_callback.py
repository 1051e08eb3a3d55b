"""A callback whose state is not plain."""

from typing import Any

from lightning.pytorch.callbacks import Callback


class KeepsASet(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"seen": {object}}
