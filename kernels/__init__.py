from kernels.token_loss import TokenStats, linear_nll, token_stats

__all__ = ["TokenStats", "linear_nll", "token_stats"]
