"""Do features come back, and does one fit know which?"""
