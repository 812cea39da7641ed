"""English function words: articles, pronouns, prepositions, conjunctions, auxiliaries, determiners, particles."""

_WORDS = """
a an the
i me my mine myself we us our ours ourselves you your yours yourself yourselves thou thee thy thine he him his himself
she her hers herself it its itself they them their theirs themselves one oneself who whom whose which what whoever
whomever whichever whatever this that these those somebody someone something anybody anyone anything everybody everyone
everything nobody none nothing
all another any both each either enough every few fewer less little many more most much neither no other others own
same several some such
aboard about above across after against along amid amidst among amongst around as at before behind below beneath beside
besides between beyond by concerning despite down during except for from in inside into like near of off on onto out
outside over past per regarding since through throughout till to toward towards under underneath unlike until unto up
upon versus via with within without
and but or nor so yet although because if lest once than though unless when whenever where whereas wherever whether
while how why
am is are was were be been being have has had having do does did done doing will would shall should can could may might
must ought cannot
ain aren couldn didn doesn don hadn hasn haven isn mightn mustn needn oughtn shan shouldn wasn weren won wouldn
not here there then thus hence therefore however also too very just only even again
hereby herein hereof hereto herewith thereby therein thereof thereto therewith thereupon whereby wherein whereof
"""
FUNCTION_WORDS = frozenset(_WORDS.split())
