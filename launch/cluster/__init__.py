"""Batch jobs on clusters: submitting them, looking at their run folders, checking an allocation, planning one."""
