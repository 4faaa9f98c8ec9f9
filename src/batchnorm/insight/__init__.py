"""What happens inside a network: seen from outside, for layers of torch.nn and of this package alike."""

from batchnorm.insight.memory import MemoryReport, ModuleMemory, memory_report

__all__ = ["MemoryReport", "ModuleMemory", "memory_report"]
