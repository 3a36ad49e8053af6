"""Speed and memory comparisons with other toolkits."""
