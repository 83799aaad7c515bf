"""What batches tell: which layers run and matter, block activations, moments of inputs and output gradients."""
