"""The proof that the serving engine chooses the tokens that decoding alone, without it, would choose."""
