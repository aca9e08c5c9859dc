"""Test only: a verl platform for a CPU, chosen by ``VERL_PLATFORM=cpu``.

Loaded by ``VERL_USE_EXTERNAL_MODULES``. The FSDP engine is registered for CUDA and NPU only, so
``VERL_ENGINE_DEVICE=cuda`` picks it, and Ray is told of as many GPUs as there are workers.
"""

import contextlib
import types

import torch
import torch.distributed
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

_device = types.ModuleType("cpu_as_device")
vars(_device).update({name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("__")})
for _name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "synchronize", "set_device", "manual_seed"):
    setattr(_device, _name, lambda *args, **kwargs: None)
for _name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
    setattr(_device, _name, lambda *args, **kwargs: 0)
_device.manual_seed_all = lambda *args, **kwargs: None
_device.mem_get_info = lambda *args, **kwargs: (0, 0)
_device.is_available = lambda: True
_device.device_count = lambda: 1
_device.current_device = lambda: torch.device("cpu")
_device.get_device_name = lambda *args: "cpu"
_device.get_rng_state = lambda *args: torch.get_rng_state()
_device.set_rng_state = lambda state, *args: torch.set_rng_state(state)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    device_name = property(lambda self: "cpu")
    vendor_name = property(lambda self: "cpu")
    device_module = property(lambda self: _device)

    def is_available(self):
        return True

    def current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CPU_VISIBLE_DEVICES"

    def nvtx_range(self, msg):
        return contextlib.nullcontext()

    def profiler_start(self):
        pass

    def profiler_stop(self):
        pass

    def ray_resource_name(self):
        return "GPU"

    def ray_noset_envvars(self):
        return []

    def ray_resource_options(self, num_gpus):
        return {"num_gpus": num_gpus}

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None


_init_process_group = torch.distributed.init_process_group


def _init_gloo(backend=None, *args, **kwargs):
    # verl joins "cpu:gloo" and the device's own backend, which on a CPU are the same one twice.
    return _init_process_group("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)


torch.distributed.init_process_group = _init_gloo
