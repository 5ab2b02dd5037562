from masking.weights import token_weights

__all__ = ["token_weights"]
