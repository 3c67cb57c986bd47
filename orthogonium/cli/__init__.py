from orthogonium.cli.main import main

__all__ = ["main"]
