"""Does a server speak the protocol? Cases as a table, judged by form alone: no model needs to be clever."""
