"""What runs inside the sandbox: standard library only, sent there as code, never imported by path."""
