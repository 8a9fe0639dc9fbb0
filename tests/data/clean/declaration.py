"""Articles 1, 3, 4, 5, 6 and 9 of the Universal Declaration of Human Rights: one text in many languages."""

TEXTS = {
    "de": """Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen \
begabt und sollen einander im Geist der Brüderlichkeit begegnen.
Jeder hat das Recht auf Leben, Freiheit und Sicherheit der Person.
Niemand darf in Sklaverei oder Leibeigenschaft gehalten werden; Sklaverei und Sklavenhandel sind in allen ihren \
Formen verboten.
Niemand darf der Folter oder grausamer, unmenschlicher oder erniedrigender Behandlung oder Strafe unterworfen werden.
Jeder hat das Recht, überall als rechtsfähig anerkannt zu werden.
Niemand darf willkürlich festgenommen, in Haft gehalten oder des Landes verwiesen werden.""",
    "en": """All human beings are born free and equal in dignity and rights. They are endowed with reason and \
conscience and should act towards one another in a spirit of brotherhood.
Everyone has the right to life, liberty and security of person.
No one shall be held in slavery or servitude; slavery and the slave trade shall be prohibited in all their forms.
No one shall be subjected to torture or to cruel, inhuman or degrading treatment or punishment.
Everyone has the right to recognition everywhere as a person before the law.
No one shall be subjected to arbitrary arrest, detention or exile.""",
    "es": """Todos los seres humanos nacen libres e iguales en dignidad y derechos. Dotados como están de razón \
y conciencia, deben comportarse fraternalmente los unos con los otros.
Todo individuo tiene derecho a la vida, a la libertad y a la seguridad de su persona.
Nadie estará sometido a esclavitud ni a servidumbre; la esclavitud y la trata de esclavos están prohibidas en \
todas sus formas.
Nadie será sometido a torturas ni a penas o tratos crueles, inhumanos o degradantes.
Todo ser humano tiene derecho, en todas partes, al reconocimiento de su personalidad jurídica.
Nadie podrá ser arbitrariamente detenido, preso ni desterrado.""",
    "fr": """Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison \
et de conscience et doivent agir les uns envers les autres dans un esprit de fraternité.
Tout individu a droit à la vie, à la liberté et à la sûreté de sa personne.
Nul ne sera tenu en esclavage ni en servitude; l'esclavage et la traite des esclaves sont interdits sous toutes \
leurs formes.
Nul ne sera soumis à la torture, ni à des peines ou traitements cruels, inhumains ou dégradants.
Chacun a le droit à la reconnaissance en tous lieux de sa personnalité juridique.
Nul ne peut être arbitrairement arrêté, détenu ou exilé.""",
    "it": """Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di ragione e \
di coscienza e devono agire gli uni verso gli altri in spirito di fratellanza.
Ogni individuo ha diritto alla vita, alla libertà ed alla sicurezza della propria persona.
Nessun individuo potrà essere tenuto in stato di schiavitù o di servitù; la schiavitù e la tratta degli schiavi \
saranno proibite sotto qualsiasi forma.
Nessuno potrà essere sottoposto a tortura o a trattamento o a punizioni crudeli, inumani o degradanti.
Ogni persona ha diritto, in ogni luogo, al riconoscimento della sua personalità giuridica.
Nessun uomo potrà essere arbitrariamente arrestato, detenuto o esiliato.""",
    "nl": """Alle mensen worden vrij en gelijk in waardigheid en rechten geboren. Zij zijn begiftigd met \
verstand en geweten, en behoren zich jegens elkander in een geest van broederschap te gedragen.
Eenieder heeft het recht op leven, vrijheid en onschendbaarheid van zijn persoon.
Niemand zal in slavernij of horigheid gehouden worden; slavernij en slavenhandel in iedere vorm zijn verboden.
Niemand zal onderworpen worden aan folteringen, of aan een wrede, onmenselijke of onterende behandeling of \
bestraffing.
Eenieder heeft, waar hij zich ook bevindt, het recht als persoon erkend te worden voor de wet.
Niemand zal onderworpen worden aan willekeurige arrestatie, detentie of verbanning.""",
    "pt": """Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de razão e de \
consciência, devem agir uns para com os outros em espírito de fraternidade.
Todo o indivíduo tem direito à vida, à liberdade e à segurança pessoal.
Ninguém será mantido em escravatura ou em servidão; a escravatura e o trato dos escravos, sob todas as formas, \
são proibidos.
Ninguém será submetido a tortura nem a penas ou tratamentos cruéis, desumanos ou degradantes.
Todos os indivíduos têm direito ao reconhecimento, em todos os lugares, da sua personalidade jurídica.
Ninguém pode ser arbitrariamente preso, detido ou exilado.""",
    "ru": """Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и \
совестью и должны поступать в отношении друг друга в духе братства.
Каждый человек имеет право на жизнь, на свободу и на личную неприкосновенность.
Никто не должен содержаться в рабстве или в подневольном состоянии; рабство и работорговля запрещаются во всех \
их видах.
Никто не должен подвергаться пыткам или жестоким, бесчеловечным или унижающим его достоинство обращению и наказанию.
Каждый человек, где бы он ни находился, имеет право на признание его правосубъектности.
Никто не может быть подвергнут произвольному аресту, задержанию или изгнанию.""",
    "zh": """人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。
人人有权享有生命、自由和人身安全。
任何人不得使为奴隶或奴役；一切形式的奴隶制度和奴隶买卖，均应予以禁止。
任何人不得加以酷刑，或施以残忍的、不人道的或侮辱性的待遇或刑罚。
人人在任何地方有权被承认在法律前的人格。
任何人不得加以任意逮捕、拘禁或放逐。""",
}
TRADITIONAL = """人人生而自由，在尊嚴和權利上一律平等。他們賦有理性和良心，並應以兄弟關係的精神相對待。
人人有權享有生命、自由和人身安全。
任何人不得使爲奴隸或奴役；一切形式的奴隸制度和奴隸買賣，均應予以禁止。
任何人不得加以酷刑，或施以殘忍的、不人道的或侮辱性的待遇或刑罰。
人人在任何地方有權被承認在法律前的人格。
任何人不得加以任意逮捕、拘禁或放逐。"""
JAPANESE = """すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。
人間は、理性と良心とを授けられており、互いに同胞の精神をもって行動しなければならない。
すべて人は、生命、自由及び身体の安全に対する権利を有する。"""
KOREAN = """모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.
인간은 천부적으로 이성과 양심을 부여받았으며 서로 형제애의 정신으로 행동하여야 한다."""
