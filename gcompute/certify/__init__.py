"""The certificate: every parallel form against an independent one-device program, row by row."""
