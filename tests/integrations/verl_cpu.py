"""A CPU platform for verl, by gloo, so that its engine runs without an accelerator. For the test only."""

from __future__ import annotations

import types
from contextlib import nullcontext
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

_DEVICE: Any = types.ModuleType("cpu_device")
for _name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
    setattr(_DEVICE, _name, lambda *_: 0)
for _name in ("empty_cache", "synchronize", "set_device", "reset_peak_memory_stats"):
    setattr(_DEVICE, _name, lambda *_: None)
_DEVICE.mem_get_info = lambda *_: (0, 1)
_DEVICE.current_device = lambda: torch.device("cpu")
_DEVICE.is_available = lambda: True
_DEVICE.device_count = lambda: 1
_DEVICE.get_rng_state, _DEVICE.set_rng_state = torch.get_rng_state, torch.set_rng_state
_DEVICE.manual_seed = torch.manual_seed
_DEVICE.get_device_name = lambda *_: "cpu"


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    device_name = vendor_name = "cpu"
    device_module = _DEVICE

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, index: Any) -> None: ...

    def synchronize(self, index: Any = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: Any) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CPU_VISIBLE_DEVICES"

    def nvtx_range(self, message: str) -> Any:
        return nullcontext()

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None
