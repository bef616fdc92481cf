"""Stop words by language: bm25s's lists, and the most common function words of languages that it lacks.

They are left out of indexes, and distinguish languages with the same script.
"""

from functools import cache

from search_e1.retrieval.bm25s_import import STOPWORDS
from search_e1.runs.languages import fold

_MORE = {
    "ar": "في من على إلى عن مع أن إن هذا هذه ذلك تلك التي الذي الذين كان كانت ما هو هي لا لم لن قد كل بعد قبل بين حتى أو ثم "
    "و كما عند منذ هل أي كيف متى أين ماذا لقد غير حيث كم",
    "bg": "на и в от се за да не по е са като до при но ще през след който която което които има това със този тази той тя "
    "те бе беше или както също където още между как какво кога",
    "ca": "de la el i en a que les els per del al un una amb és va dels no són com més seva es o aquest aquesta ser pel era "
    "quan qui quina quin on fou molt també però hi",
    "cs": "a v na se je z do o že s ve k za od pro i jako po jeho jsou by byl byla bylo ale při nebo který která které ze "
    "také však až kdo kde kdy jaký podle než",
    "el": "και το του της η ο τα των στο στη στην με που την τον για από οι είναι σε ένα μια τους τις να θα δεν ήταν ως "
    "στις στα κατά ποιος ποια ποιο πότε πού αυτό αυτή",
    "et": "ja on ei see et ka oli ta mis kui aga nii selle oma kes seda siis mille või ning tema nad kus millal pärast",
    "fa": "و در به از که این را با است برای آن یک خود تا بر هم نیز های می شد شده بود کرد او چه کدام چند کجا وی ها دارد اما "
    "یا پس",
    "fi": "ja on ei se oli että joka kun hän mutta myös ovat sen mitä missä milloin kuka mikä jossa jonka sekä tai kuin "
    "olivat ne jotka hänen tämä vuonna niin",
    "he": "של את על הוא היא לא גם זה עם אל או כי כל אם היה הייתה בין אשר מה מי איפה מתי כמה יותר אך רק זו הם אבל",
    "hi": "के में की है और से का को पर एक यह ने हैं इस भी कि जो कर था थी थे हो तक वह कौन क्या कब कहाँ किस द्वारा लिए साथ "
    "बाद नहीं अपने या गया तथा कितने",
    "hu": "a az és hogy nem is egy volt meg ez de van mint csak már el még vagy ki mi hol mikor melyik aki amely ezt azt "
    "után között szerint lett voltak",
    "id": "yang dan di dari dengan untuk pada ini adalah dalam itu ke oleh sebagai juga tidak akan atau karena telah apa "
    "siapa kapan mana ada lebih para bahwa saat seorang",
    "lt": "ir yra buvo kad su iš į apie nuo tai kuris kuri jo jos kaip bet ar per po už kas kur kada jis ji taip pat dėl",
    "pl": "w i na z się do jest że o nie to po od za przez jak który która które jego jej był była było są oraz dla ale też "
    "we ze ten kto co kiedy gdzie jaki jaka lub przy",
    "ro": "de și în la a cu din pe care o un este fost prin pentru mai sau al ale nu sunt lui ca se cel cea era după cine "
    "unde când ce această acest fi",
    "sr": "je i u na se da su od za sa kao o iz koji koja koje bio bila bilo ali ne po do ili ko gde kada koliko što nije "
    "је и у на се да су од за са као о из који која које био била било али не по до или ко где када колико што није",
    "uk": "і в на з до що у не та за від як є це про для його її по він вона був була було які який яка яке або але також "
    "коли де хто після під між якому",
    "vi": "và của là có được trong cho một không các với người những này đã từ ở đến khi ra như để vào cũng về nào gì ai "
    "đâu bao",
}  # fmt: skip


@cache
def stop_words(code: str) -> frozenset[str]:
    """The stop words of a language, folded like an index's words (except English); empty if there is no list."""
    words = STOPWORDS.get(code) or _MORE.get(code, "").split()
    return frozenset(words if code == "en" else (fold(word, (code,)) for word in words))


LISTED = tuple(sorted({*STOPWORDS, *_MORE}))
"""Languages with a list."""
