"""What every side measures with: a clock and the peak of its memory."""

import resource
import sys
import time


def now() -> float:
  """Returns seconds; on a GPU torch's queue is empty by then."""
  torch = sys.modules.get("torch")
  if torch is not None and torch.cuda.is_available():
    torch.cuda.synchronize()
  return time.perf_counter()


def peak_bytes(torch=None) -> int:
  """Returns the process's peak resident memory, or given `torch` the GPU's peak allocation."""
  if torch is not None:
    return torch.cuda.max_memory_allocated()
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
