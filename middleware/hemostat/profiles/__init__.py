"""The life of calibration profiles: proposed, tested, promoted, rolled back."""
