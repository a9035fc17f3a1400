"""What chips can do: a catalogue with the source of every figure, slices and links, prices."""
