"""What chips can do: a catalogue with the source of every figure, prices, the slices of a TPU and their links."""
