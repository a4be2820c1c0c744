"""Chips that are not there: described by the compilers that are made for them, which need none to compile."""

import contextlib
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from dpojax.runtime.errors import ConfigError

TPUS = ("v4", "v5e", "v5p", "v6e")

GPUS = {
  "h100": """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  device_memory_size: 84978434048 memory_bandwidth: 3352320000000
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
}
"""What XLA has to know of a GPU that is not there."""


class Topology(NamedTuple):
  """Devices that programs can be compiled for.

  Attributes:
    name: as it was asked for.
    chip: of `chips.CHIPS`.
    platform: what kernels are built for, 'tpu' or 'gpu'.
    devices: jax's, in the order of the compiler; they hold no arrays.
    compiler: its versions, a part of what results are kept by.
    torus: how many chips stand in each direction; () where each is linked to all others.
  """

  name: str
  chip: str
  platform: str
  devices: list[jax.Device]
  compiler: str
  torus: tuple[int, ...] = ()


def described(name: str) -> Topology:
  """Returns the devices of a name such as 'v5e:16x16', 'v5p:4x4x4' or 'gpu:8xh100'.

  Before any other use of jax its platform must have been set to 'cpu': libtpu looks for chips.

  Raises:
    ConfigError: there are no such chips, or their compiler is not installed.
  """
  if found := re.fullmatch(r"gpu:(\d+)x(\w+)", name):
    return _gpus(name, int(found[1]), found[2])
  chip, _, shape = name.partition(":")
  if chip not in TPUS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
    raise ConfigError(
      f"--topology is {name!r}; it must be such as v5e:16x16, v5p:4x4x4 (of {', '.join(TPUS)}), or "
      f"gpu:8xh100 (of {', '.join(GPUS)})"
    )
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu asks for the machine it is on
  # It lets one process of a machine in, for the sake of chips that are not used here.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  # Its two cores are one device, as jax has them where such chips are.
  more = {"chip_config_name": "megacore"} if chip == "v4" else {}
  try:
    with _quiet():
      devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices
  except RuntimeError as error:
    if "not installed" in str(error):
      raise ConfigError(
        f"--topology={name} needs the TPU's own compiler, libtpu; pip install 'dpojax[plan]'"
      ) from error
    raise ConfigError(f"--topology={name} is none that libtpu knows: {str(error).splitlines()[0]}") from error
  torus = tuple(int(size) for size in shape.split("x") if int(size) > 1)
  return Topology(name, chip, "tpu", list(devices), f"jax {jax.__version__}, {_version('libtpu')}", torus)


def _gpus(name: str, count: int, chip: str) -> Topology:
  if chip not in GPUS:
    raise ConfigError(f"--topology is {name!r}; GPUs that can be described are {', '.join(GPUS)}")
  try:
    with _quiet():
      devices = topologies.get_topology_desc(
        platform="cuda", topology=f"1x1x{count}", target_config=GPUS[chip]
      ).devices
  except (NotImplementedError, RuntimeError) as error:
    raise ConfigError(
      f"--topology={name} needs jax's CUDA plugin of jax's own version: pip install jax-cuda12-plugin "
      f"jax-cuda12-pjrt nvidia-cuda-nvcc-cu12 ({str(error).splitlines()[0]})"
    ) from error
  return Topology(name, chip, "gpu", list(devices), f"jax {jax.__version__}, {_version('jax-cuda12-pjrt')}")


def _version(package: str) -> str:
  from importlib import metadata

  with contextlib.suppress(metadata.PackageNotFoundError):
    return f"{package} {metadata.version(package)}"
  return package


@contextlib.contextmanager
def _quiet():
  """Keeps what libtpu writes to the process's standard error about the machine it is on out of sight."""
  kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  try:
    # At the level of file descriptors: libtpu is no Python and knows no sys.stderr.
    os.dup2(null, 2)
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(null)
