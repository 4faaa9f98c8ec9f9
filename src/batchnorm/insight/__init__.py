"""What happens inside a network: seen from outside, for layers of torch.nn and of this package alike."""

from batchnorm.insight.gap import Gap, LayerGap, explain_gap
from batchnorm.insight.memory import MemoryReport, ModuleMemory, memory_report

__all__ = ["Gap", "LayerGap", "MemoryReport", "ModuleMemory", "explain_gap", "memory_report"]
