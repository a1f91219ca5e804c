"""The guide's pictures, and the runs behind them."""
