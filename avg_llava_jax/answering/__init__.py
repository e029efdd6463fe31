"""From a request to its answer: host-side preparation, and the compiled programs it runs through."""
