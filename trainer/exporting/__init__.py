"""What all exports share: the plain graph of a network, its shared values, the proof that a target answers as the student."""
