"""Native code for CPUs: the model's forward pass and the choice of tokens, in C++ that is compiled where it is used."""
