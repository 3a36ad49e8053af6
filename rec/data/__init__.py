"""From one public source to a prepared folder, and from there to tensors."""
