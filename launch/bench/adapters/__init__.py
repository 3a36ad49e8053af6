"""Scripts that another toolkit's own Python runs; they import that toolkit and each other, never recalign."""
