def spread_of(*a): return None
def write(*a): return None
