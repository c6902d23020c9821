"""The model: ops put together by the configuration, one file a part."""
