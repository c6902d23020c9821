"""What a sequence leaves behind for its next token: window, compressed rows, index keys, compressor tail."""
