"""Gates on an exported artifact: is it still as good as the one that was accepted?"""
