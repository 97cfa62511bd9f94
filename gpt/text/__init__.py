"""Text -> ids -> shards -> windows."""
