# ruff: noqa: E501  # a passage and its question are one line
"""Recall of BM25 in languages other than English, with the English rule and with the language of the corpus.

    python benchmarks/languages.py

Each language has 20 short passages of facts with a question each, paraphrased if the language allows. A question counts if its
passage is among the first three. Passages of a language share their subjects (rivers, cities, people), so that a question's
rarest word alone does not decide.
"""

import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")

from search_e1.retrieval.bm25 import Bm25Index
from search_e1.types import Passage

TOPK = 3
FACTS = {
    "Chinese": """
长江发源于青藏高原，全长六千三百多公里，在上海附近流入东海，是亚洲第一长河。|亚洲最长的河流在哪里入海？
黄河流经九个省区，因携带大量泥沙而呈黄色，最后注入渤海。|哪条河因为泥沙多而是黄颜色的？
珠江是中国南方的大河，流经广州，注入南海。|广州位于哪条河边？
北京是中华人民共和国的首都，位于华北平原北部，故宫坐落在市中心。|故宫在哪个城市？
上海是中国人口最多的城市，拥有世界上最繁忙的集装箱港口。|世界最繁忙的港口属于哪座城市？
西安古称长安，曾是十三个朝代的都城，城外有秦始皇兵马俑。|兵马俑在哪座古都附近？
成都是四川省省会，以大熊猫繁育基地和火锅闻名。|想看大熊猫应该去哪个省会？
杭州是浙江省的省会，西湖是当地最著名的风景。|西湖位于哪个省的省会？
哈尔滨位于黑龙江省，每年冬天举办冰雪节。|冰雪节在哪座城市举行？
拉萨海拔三千六百多米，布达拉宫建在红山上。|布达拉宫所在城市的海拔是多少？
鲁迅原名周树人，写了《狂人日记》和《阿Q正传》，是现代文学的奠基人。|《阿Q正传》的作者原来叫什么名字？
李白是唐代诗人，被称为诗仙，写过《静夜思》。|谁被人们称作诗仙？
杜甫也是唐代的诗人，被称为诗圣，他的诗反映了安史之乱。|哪位诗人的作品反映安史之乱？
孔子生于鲁国，是儒家学派的创始人，弟子们把他的话编成《论语》。|儒家是由谁创立的？
屠呦呦因发现青蒿素于二〇一五年获得诺贝尔医学奖。|发现青蒿素的科学家得了什么奖？
袁隆平培育出杂交水稻，大大提高了粮食产量。|杂交水稻是谁研究出来的？
长城修建于多个朝代，明长城从山海关延伸到嘉峪关。|明代修的长城东端在哪里？
京杭大运河连接北京与杭州，是世界上最长的人工河。|世界最长的人工河道连接哪两座城市？
造纸术由东汉的蔡伦改进，使用树皮和破布作原料。|东汉时谁改进了造纸的方法？
青海湖是中国最大的内陆咸水湖，湖中鸟岛上有许多候鸟。|中国面积最大的咸水湖叫什么？
""",
    "Japanese": """
富士山は標高三七七六メートルで、静岡県と山梨県にまたがる日本一高い山である。|日本で最も高い山の標高は？
琵琶湖は滋賀県にある日本最大の湖で、淀川の水源となっている。|日本で一番大きい湖は何県にありますか？
信濃川は長野県と新潟県を流れ、日本海に注ぐ日本一長い川である。|日本で最も長い川はどの海に流れ込みますか？
東京は日本の首都で、江戸と呼ばれていた町が明治元年に改称された。|江戸は今では何という都市ですか？
京都は千年以上にわたって都が置かれ、金閣寺や清水寺がある。|金閣寺がある都市は？
大阪は商業の町として栄え、豊臣秀吉が城を築いた。|豊臣秀吉はどこに城を建てましたか？
札幌は北海道の道庁所在地で、二月に雪まつりが開かれる。|雪まつりが行われる北海道の都市は？
広島には世界遺産の原爆ドームがあり、近くに厳島神社もある。|原爆ドームはどの都市にありますか？
奈良の東大寺には大仏があり、公園には鹿が暮らしている。|鹿のいる公園がある町の大仏はどの寺にありますか？
沖縄は一九七二年に日本へ復帰し、首里城は琉球王国の王宮であった。|琉球王国の王が住んだ城は？
夏目漱石は「坊っちゃん」「こころ」などを書いた明治の小説家である。|「こころ」を書いた作家は誰ですか？
紫式部は平安時代に源氏物語を著した女性作家である。|源氏物語の作者は誰？
川端康成は一九六八年に日本人で初めてノーベル文学賞を受賞した。|最初にノーベル文学賞をもらった日本の作家は？
湯川秀樹は中間子の存在を予言し、物理学賞を受けた。|中間子を予言した物理学者の名前は？
徳川家康は一六〇三年に江戸幕府を開いた。|江戸幕府を始めた将軍は誰ですか？
織田信長は本能寺で家臣の明智光秀に討たれた。|信長を裏切った家来の名は？
新幹線は一九六四年に東京と新大阪の間で開業した。|新幹線が最初に走った年は？
寿司は酢飯に魚介をのせた料理で、江戸前のものが広く知られる。|酢を混ぜたご飯に魚をのせる食べ物は？
相撲は土俵の上で力士が戦う競技で、最高位は横綱という。|力士の一番高い地位は何と呼ばれますか？
青函トンネルは津軽海峡の下を通り、本州と北海道を結ぶ。|本州と北海道をつなぐ海底トンネルの名前は？
""",
    "Thai": """
แม่น้ำเจ้าพระยาเกิดจากแม่น้ำปิง วัง ยม และน่านมารวมกันที่นครสวรรค์|แม่น้ำปิงกับแม่น้ำน่านรวมเป็นแม่น้ำสายใด
แม่น้ำโขงเป็นพรมแดนระหว่างไทยกับลาวและไหลลงทะเลจีนใต้|พรมแดนไทยลาวคือแม่น้ำอะไร
กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทยตั้งแต่ปี พ.ศ. ๒๓๒๕|เมืองหลวงของไทยคือที่ไหน
เชียงใหม่เป็นเมืองใหญ่ทางภาคเหนือ มีวัดพระธาตุดอยสุเทพ|วัดพระธาตุดอยสุเทพอยู่จังหวัดใด
อยุธยาเคยเป็นราชธานีนานสี่ร้อยปีก่อนเสียกรุงแก่พม่า|ราชธานีเก่าที่เสียแก่พม่าคือเมืองอะไร
สุโขทัยเป็นอาณาจักรที่พ่อขุนรามคำแหงประดิษฐ์อักษรไทย|ใครเป็นผู้ประดิษฐ์ตัวอักษรไทย
ภูเก็ตเป็นเกาะที่ใหญ่ที่สุดของประเทศไทยในทะเลอันดามัน|เกาะใหญ่ที่สุดของไทยอยู่ในทะเลใด
ดอยอินทนนท์เป็นยอดเขาที่สูงที่สุดในประเทศไทย สูงสองพันห้าร้อยเมตร|ภูเขาสูงที่สุดในไทยชื่ออะไร
เขาใหญ่เป็นอุทยานแห่งชาติแห่งแรกของไทย มีช้างป่าอาศัยอยู่|อุทยานแห่งชาติแห่งแรกคือที่ใด
ทะเลสาบสงขลาเป็นทะเลสาบขนาดใหญ่ในภาคใต้|ทะเลสาบใหญ่ทางภาคใต้ชื่อว่าอะไร
สุนทรภู่เป็นกวีเอกผู้แต่งเรื่องพระอภัยมณี|พระอภัยมณีใครเป็นคนแต่ง
รามเกียรติ์เป็นวรรณคดีที่ดัดแปลงจากรามายณะของอินเดีย|วรรณคดีเรื่องใดมาจากรามายณะ
มวยไทยเป็นศิลปะการต่อสู้ที่ใช้หมัด เท้า เข่า และศอก|กีฬาต่อสู้ที่ใช้เข่าและศอกคืออะไร
ต้มยำกุ้งเป็นแกงรสเปรี้ยวเผ็ดที่ใส่ตะไคร้และใบมะกรูด|แกงรสเปรี้ยวที่ใส่กุ้งและตะไคร้เรียกว่าอะไร
สงกรานต์เป็นเทศกาลปีใหม่ไทยในเดือนเมษายนที่ผู้คนสาดน้ำกัน|เทศกาลสาดน้ำจัดในเดือนอะไร
ลอยกระทงเป็นประเพณีคืนวันเพ็ญเดือนสิบสองเพื่อขอขมาพระแม่คงคา|ประเพณีวันเพ็ญเดือนสิบสองเรียกว่าอะไร
พระแก้วมรกตประดิษฐานอยู่ในวัดพระศรีรัตนศาสดาราม|พระแก้วมรกตอยู่ที่วัดไหน
สะพานข้ามแม่น้ำแควสร้างโดยเชลยศึกในจังหวัดกาญจนบุรี|สะพานที่เชลยศึกสร้างอยู่จังหวัดอะไร
ข้าวหอมมะลิปลูกมากในภาคอีสานโดยเฉพาะทุ่งกุลาร้องไห้|ทุ่งกุลาร้องไห้มีชื่อเสียงเรื่องข้าวชนิดใด
รถไฟฟ้าบีทีเอสเปิดให้บริการในปี พ.ศ. ๒๕๔๒|รถไฟฟ้าเปิดให้บริการ พ.ศ. 2542 มีชื่อว่าอะไร
""",
    "Arabic": """
نهر النيل يجري من بحيرة فيكتوريا إلى البحر المتوسط وطوله نحو ستة آلاف كيلومتر.|أين يصبّ النيل؟
نهر الفرات ينبع في تركيا ويمر بسوريا والعراق.|من أي بلد ينبع الفرات؟
تقع مدينة القاهرة على ضفاف النهر، وهي عاصمة مصر وأكبر مدنها.|ما هي العاصمة المصرية؟
الرياض عاصمة المملكة العربية السعودية وتقع في هضبة نجد.|أية مدينة هي عاصمة السعوديّة؟
بغداد أسسها الخليفة المنصور عاصمةً للعباسيين سنة ٧٦٢.|من مؤسّس بغداد؟
دمشق من أقدم المدن المأهولة، وفيها الجامع الأموي.|في أي مدينة يوجد المسجد والجامع الاموي؟
الرباط عاصمة المغرب، أما الدار البيضاء فأكبر مدنه.|ما أكبر مدينة مغربية؟ هل هي الدار البيضاء؟
قرطاج مدينة قديمة قرب تونس أسسها الفينيقيون.|من الذين أسّسوا قرطاج؟ أهم فينيقيون؟
البتراء مدينة منحوتة في الصخر جنوب الأردن بناها الأنباط.|أين مدينة الانباط الصخرية؟
برج خليفة في دبي أعلى بناء في العالم بارتفاع ٨٢٨ مترًا.|كم ارتفاع البرج الأعلى في دبي؟
نجيب محفوظ روائي مصري نال جائزة نوبل للآداب عام ١٩٨٨.|أي روائيّ حصل على نوبل سنة 1988؟
ابن خلدون مؤرخ كتب المقدمة ويعد مؤسس علم الاجتماع.|من كتب مقدمةً في التاريخ والاجتماع؟
ابن سينا طبيب وفيلسوف ألف كتاب القانون في الطب.|ما اسم الطبيب الذي ألّف القانون؟
الخوارزمي عالم رياضيات وضع أسس الجبر.|من العالِم الذي أسس الجبر والرياضيّات؟
المتنبي شاعر عاش في بلاط سيف الدولة في حلب.|أي الشعراء كان في حلب عند سيف الدولة؟
أم كلثوم مطربة مصرية لقبت بكوكب الشرق.|من هي المطربة الملقبة بكوكب الشرق؟
قناة السويس تصل البحر الأحمر بالبحر المتوسط وافتتحت عام ١٨٦٩.|متى كان افتتاح القناة في السويس؟
الأهرامات في الجيزة قبور للملوك، وأكبرها هرم خوفو.|لمن بُني الهرم الأكبر في الجيزة؟
جبل توبقال أعلى قمة في جبال الأطلس بالمغرب.|ما اسم أعلى القمم في الاطلس؟
البحر الميت أخفض نقطة على اليابسة ومياهه شديدة الملوحة.|أي بحر مياهُهُ مالحة وهو أخفض النقاط؟
""",
    "German": """
Der Rhein entspringt in den Schweizer Alpen und mündet bei Rotterdam in die Nordsee.|In welches Meer münden die Wasser des Rheins?
Die Donau durchfließt zehn Länder, mehr als jeder andere Fluss.|Welcher der Flüsse fließt durch die meisten Länder?
Die Elbe durchströmt Dresden und Hamburg und erreicht bei Cuxhaven das Meer.|An welchem Strom liegen die Hamburger Häfen?
Berlin ist die Hauptstadt und mit fast vier Millionen Einwohnern die größte Stadt.|Welche deutschen Städte haben Millionen von Einwohnern und wo regiert die Hauptstadt?
München richtet jedes Jahr das Oktoberfest auf der Theresienwiese aus.|Auf welchen Wiesen wird das Münchner Oktoberfest gefeiert?
Der Kölner Dom wurde nach über sechshundert Jahren Bauzeit vollendet.|Wie viele Jahre bauten die Koelner an ihrem Dom?
In Frankfurt am Main haben die Europäische Zentralbank und viele Banken ihren Sitz.|Wo sitzt die Bank der Europäer, die zentrale?
Leipzig war ein Ausgangspunkt der Montagsdemonstrationen gegen die Regierung der DDR.|In welcher Stadt gab es eine Demonstration gegen die DDR-Regierungen?
Die Zugspitze ist mit 2962 Metern der höchste Berg in den bayerischen Alpen.|Welcher unter den höchsten Bergen steht in den Bayerischen Alpen?
Der Bodensee grenzt an Deutschland, Österreich und die Schweiz.|Welche Staaten haben Grenzen an den Seen bei Österreich, der Schweiz und Deutschland?
Johann Wolfgang von Goethe schrieb den Faust und lebte lange in Weimar.|Wer hat Goethes Weimarer Werk, den Faust, geschrieben?
Friedrich Schiller verfasste die Räuber und Wilhelm Tell.|Welches Drama eines Räubers verfaßte der Dichter des Tell?
Thomas Mann bekam 1929 den Nobelpreis für die Buddenbrooks.|Für welchen Roman erhielt Mann die Nobelpreise?
Johannes Gutenberg erfand in Mainz den Buchdruck mit beweglichen Lettern.|Wer druckte in Mainzer Werkstätten zuerst mit einer beweglichen Letter?
Carl Benz baute 1886 in Mannheim das erste Automobil.|Wer war der Erbauer der ersten Automobile?
Robert Koch entdeckte den Erreger der Tuberkulose.|Welcher Arzt hat die Tuberkuloseerreger, den Erregern vieler Krankheiten gleich, entdeckt?
Ludwig van Beethoven komponierte seine neunte Sinfonie, als er schon taub war.|Welcher taube Komponist schuf neun Sinfonien?
Albrecht Dürer malte in Nürnberg und zeichnete einen Feldhasen.|Welcher Nürnberger Maler hat Zeichnungen von Hasen gemacht?
Die Berliner Mauer fiel am neunten November 1989.|Wann war der Fall der Mauern in Berlin?
Das Brandenburger Tor wurde nach dem Vorbild eines Tores in Athen errichtet.|Nach welchen Vorbildern errichtete man das Tor der Brandenburger?
""",
}
"""Language -> lines of a passage and its question."""


def recall(passages: list[Passage], questions: list[str], directory: Path, language: str) -> tuple[str, str]:
    """The shares of questions whose passage is first, and among the first ``TOPK``; and the language of the index."""
    index = Bm25Index.build(passages, directory, language=language)
    found = index.search(questions, TOPK)
    ids = [[hit.id for hit in own] for own in found]
    ranks = [own.index(p.id) if p.id in own else TOPK for p, own in zip(passages, ids, strict=True)]
    shares = (sum(rank < k for rank in ranks) / len(ranks) for k in (1, TOPK))
    return " / ".join(f"{share:.2f}" for share in shares), index.analysis.language


def main() -> None:
    logging.disable(logging.WARNING)
    corpora = {name: [line.split("|") for line in text.strip().splitlines()] for name, text in FACTS.items()}
    corpora["all five"] = [pair for pairs in corpora.values() for pair in pairs]
    print("| corpus | passages | English's rule | `auto` | taken for |\n|---|---|---|---|---|")
    with TemporaryDirectory() as folder:
        for name, pairs in corpora.items():
            passages = [Passage(id=str(i), title="", text=passage) for i, (passage, _) in enumerate(pairs)]
            questions = [question for _, question in pairs]
            before, _ = recall(passages, questions, Path(folder) / f"{name}-en", "en")
            after, language = recall(passages, questions, Path(folder) / f"{name}-auto", "auto")
            print(f"| {name} | {len(pairs)} | {before} | {after} | `{language}` |")


if __name__ == "__main__":
    main()
