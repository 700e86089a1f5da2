"""One file an architecture: a model as a graph, written as its paper writes it."""
