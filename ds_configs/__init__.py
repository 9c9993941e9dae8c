"""DeepSpeed JSON files: ZeRO mechanics only."""
