"""The grammar of the fuzzer: random spellings of attention, and look-alikes without any."""
