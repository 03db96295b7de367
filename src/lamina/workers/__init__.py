"""Model worker, attention worker and the processes around them."""
