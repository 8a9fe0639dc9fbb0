"""Lines of the development set, each with one form of a country, a service or a notation.

[[kind|value]] is an expected finding, {{value}} is none. Both are templates: # is a random digit, ¤ a hexadecimal
digit, ¿ a letter or digit, § a capital letter or digit of base 32; <name> calls the generator of that name, and ↵ is a
line end.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from tests.data.clean.pii_values import fill

LINES = """
Tel.: [[phone|030 ########]]
Telefon: [[phone|0221/#######]]
Rufen Sie uns an: [[phone|(089) ######-##]]
Mobil [[phone|0171/2######]] oder abends
Handy: [[phone|0151-2#######]]
Tel [[phone|+49 (0)30 ####-####]]
Tel [[phone|+49 (0) 40 / ### ## ##]], Fax [[phone|+49 (0) 40 / ### ## ##]]
Erreichbar unter [[phone|0049 69 #######]].
Müller,[[phone|030 6######]],Berlin
tel=[[phone|0301######]]
Büro [[phone|0711 / 9# ## ##]]
Die Nummer lautet [[phone|06131-######]].
Herr Schmidt, [[phone|0176 2# ### ###]], holt es ab
Anruf unter [[phone|0911 2###-0]]
Praxis Dr. Weber · [[phone|0621 4#####]] · Mannheim
Durchwahl: [[phone|0721 608-4####]]
Téléphone : [[phone|01 4# ## ## ##]]
Tél. [[phone|01.4#.##.##.##]]
Appelez le [[phone|06 12 ## ## ##]] ce soir
portable [[phone|06-12-##-##-##]]
Mon numéro : [[phone|0612######]]
nom;[[phone|0712######]];Lyon
contactez le [[phone|+33 (0)1 4# ## ## ##]]
fax [[phone|0033 4 7# ## ## ##]]
T: [[phone|020 7### ####]]
Ring me on [[phone|07### ######]]
mobile=[[phone|07#########]]
Office: [[phone|(0161) 2## ####]]
Phone [[phone|0121 3## ####]] or email
call us: [[phone|01223 3#####]]
Reception [[phone|+44 (0)20 7### ####]] ext. 12
The surgery is on [[phone|01865 2#####]].
M: [[phone|+44 7### ######]]
name,[[phone|212-736-####]],NY
tel:[[phone|+1-212-736-####]]
<a href="tel:[[phone|+14155238###]]">call</a>
Phone: [[phone|(415) 523-8### ext. 204]]
phone=[[phone|4155238###]]
"phone": "[[phone|6467829###]]"
Cell [[phone|646.782.9###]]
my number is [[phone|646 782 9###]]
Text [[phone|1-646-782-9###]]
1,[[phone|(646)782-9###]],home
toll free [[phone|1 (888) 523-8###]]
Toronto office [[phone|416-736-####]]
Teléfono: [[phone|91 ### ## ##]]
Móvil: [[phone|6## ### ###]]
Llámame al [[phone|6## ## ## ##]]
tel. [[phone|+34 6## ### ###]]
WhatsApp [[phone|+34 91 ### ## ##]]
Tel. [[phone|06 5### ####]] Roma
Cell. [[phone|347 12#####]]
telefono [[phone|02 8### ####]]
chiamare il +39, cioè [[phone|+39 06 5### ####]]
Bel [[phone|020-6######]]
Mobiel: [[phone|06-2#######]]
tel [[phone|+31 (0)20 6## ####]]
Zürich [[phone|044 2## ## ##]]
Natel [[phone|079 4## ## ##]]
Tel. [[phone|+41 (0)44 2## ## ##]]
Wien: [[phone|01 512####]]
Mobil: [[phone|0664 #######]]
電話 [[phone|03-5###-####]]
携帯：[[phone|090-3###-####]]
TEL [[phone|06-6###-####]]
FAX:[[phone|045-3##-####]]
フリーダイヤル [[phone|0120-3##-###]]
전화 [[phone|02-5###-####]]
휴대폰: [[phone|010-5###-####]]
連絡先 [[phone|+81 90 3### ####]]
Call [[phone|+91 98### #####]]
Mobile no. [[phone|98########]]
Delhi office [[phone|011-2#######]]
mobile: [[phone|98###-#####]]
Telefone: [[phone|(11) 9####-####]]
Fale conosco [[phone|(21) 3###-####]]
celular [[phone|+55 11 9####-####]]
Sydney: [[phone|(02) 9### ####]]
mob [[phone|0412 ### ###]]
ph: [[phone|+61 4## ### ###]]
手机号：[[phone|１３９########]]
手机号,[[phone|139########]],男
m=[[phone|139########]]&x=1
[[phone|139########]],[[phone|138########]]
电话[[phone|010-6#######]]-801
联系电话：[[phone|0755-2#######]]
座机（[[phone|021-5#######]]）
致电 [[phone|021 5### ####]]
手机：[[phone|139.6###.####]]
手机 [[phone|+86-139-####-####]]
传真：[[phone|（0571）8#######]]
тел. [[phone|8 (495) ###-##-##]]
звоните: [[phone|+7 916 ###-##-##]]
[[phone|8-916-###-##-##]] Иван
tel. [[phone|+48 5## ### ###]]
tlf. [[phone|+45 2# ## ## ##]]
Tel: [[phone|+65 6### ####]]
HK office [[phone|+852 2### ####]]
台北 [[phone|(02) 2###-####]]
手機 [[phone|0912-3##-###]]
Tel.: [[phone|+49 30 ####-####]]
Phone: [[phone|+1 212 736 ####]]
[2026-11-03 10:22:31] INFO sms sent to [[phone|+4917612######]]
caller=[[phone|+33612######]] dur=12s
| Anna | [[phone|0170 2######]] | Köln |
wa.me/[[phone|4917612######]]
Contact: [[phone|+353 1 4## ####]]
sip:[[phone|+4930########]]@voip.example.net
Bestellnummer 0171 2345678
Artikelnr. 0221-4467123
Rechnungsnummer: 0301234567
Kundennummer 089 4433221
Auftrag Nr. 0711/9988776
commande n° 06 12 34 56 78
Référence : 0145678923
pedido 612 345 678
Aktenzeichen 030-1234567
ISBN 0-306-40615-2
ISBN 0306406152
les années 01.02.2024 et 03.04.2025
am 01-02-2024 1015 Uhr
population 12 345 678 habitants
612 345 678 habitants
le total est de 0,0612345678
decimal 0.0612345678 of it
version 01.02.03.04
bytes 0123 4567 8910
0x0712345678
id 0712345678
UPC 012345678905
key 0012345678901
lat 139.69171234, lon 35.68950000
range 01-02-03-04
10.1016/0021-9991(78)90023-2
arXiv:0712.34567
SKU 0212-4567890
lot 0451-998-2231
2026-11-03 10:22:31,123 step 139000 of 138000000
[1200, 13800, 139000000, 15]
12 345 678 901 bytes
p. 123-456-7890ff
match 3-0 6-2 6-4 7-6
call 1234 times
phones sold: 12,345,678
mobile 5G 2024 2025
chip 8051-2213-7789
5.139123456789
-0.13912345678
1e13912345678
bitcoin block 00000000000000000001391234
flight 0171 2345678
uuid 0171234-5678
n = 4155238123
width 4155238123 px
epoch 1700000000 1700000001
UTC+0100 20240512
sum 2026 1101 1200
4-2-8 and 3-5-2
"order_id": 13912345678,
ts=13912345678
(1991) 12345-6789
ICD-10 0171 2345
+12345678 points
1+4915112345678=x
+49.15112345678 degrees
Kontonummer 0171234567
BLZ 100 500 00
QQ 1391234567
公里数 13912345
批号：13912345678
学号 13912345678
[[email|anna.mueller@müller-gmbh.de]]
mail an [[email|info@bäckerei-schmidt.berlin]]
[[email|j.doe@studio.design]] writes
reach [[email|hello@acme.cloud]]
write [[email|kontakt@stadt.koeln]] or [[email|office@firma.wien]]
[[email|jan.kowalski@wp.pl]], [[email|ion@mail.md]], [[email|ana@posta.rs]]
E-Mail: [[email|x.y+tag@sub.uni-jena.de]]
почта [[email|иван@почта.рф]]
пишите: [[email|ivan@xn--80a1acny.xn--p1ai]]
邮箱[[email|wang@例子.中国]]，谢谢
邮件：[[email|li.na@qq.com]]或者电话
发到[[email|wang88@163.com]]请确认
user=[[email|tom.b@web.de]];role=admin
a,[[email|bob@mail.co.uk]],1
<[[email|o'neill@dublin.ie]]>
"[[email|mary_ann@school.edu]]"
[[email|sales@shop.online]] and [[email|me@my.name]]
mailto:[[email|ceo@startup.io]]?subject=x
[[email|tom [at] web [dot] de]]
[[email|anna(at)posteo.de]]
kontakt: [[email|max.muster(at)firma-nord(dot)de]]
[[email|peter AT gmail DOT com]]
write to [[email|jane_doe at gmail dot com]]
[[email|hans [ät] gmx [punkt] net]]
[[email|luis (arroba) correo (punto) es]]
[[email|julie [arobase] laposte [point] net]]
[[email|bob@mail[.]ru]]
mail ｔｏ [[email|tom＠gmail.com]]
%40: [[email|tom%40gmail.com]]
entity [[email|tom&#64;gmail.com]]
Mail: [[email|bob@new.quantumx]]
Email: [[email|lisa@corp.newbrand]]
cc: [[email|ALICE@UNI-MAINZ.DE]]
[[email|first.last@dept.company.co.jp]].
[[email|x@y.cn]]
[[email|tom@gmail.com]].Then he left
git@github.com:foo/bar.git
ssh deploy@web1.cluster.net uptime
scp data.tar backup@nas.home.org:/vol
https://user@host.com/path
Message-ID: <20261103.AB12@mail.gmail.com>
In-Reply-To: <CA+123@mail.gmail.com>
name@example.co.uk
you@yourdomain.com
user@domain.com
foo@sub.example.org
test@localhost.localdomain
admin@intranet.local
q@k.mT
a @ b.to(x)
self@other.T
lib@2.3.1-rc.dev
pkg@10.2.dev
icon@2x.png icon@3x.zip
@user@mastodon.social
systemd getty@tty1.service
Object@1b6d3586.hash
meet us at amazon dot com
look at me dot dot dot
f@x.y
$user@$host.com
%s@%s.com
{{¿¿}}@noop.quux
react@18.2.0
look at [1] and (at) once
ip [[ip|81.92.17.4]]
from [[ip|93.184.216.34]] port 22
Server [[ip|52.14.201.7]] down
<td>[[ip|185.199.108.153]]</td>
if ip == "[[ip|121.40.81.9]]":
src=[[ip|114.88.3.201]] dst=10.0.0.1
[[ip|23.7.201.9]]:8080
[[ip|203.119.25.1]]/24
[[ip|45.155.205.233]],2026-11-03,blocked
blocked [[ip|45.155.205[.]233]]
[[ip|91.108.4.10]]-[[ip|91.108.4.90]]
ssh admin@[[ip|8.14.22.9]]
ping [[ip|1.12.13.14]]
IP地址：[[ip|5.6.7.8]]
登录 IP [[ip|１１４.８８.３.２０１]]
see peer [[ip|::ffff:121.40.81.9]]
[[ip|2a00:1450:4001:81b::200e]]
[[[ip|2606:4700:4700::1111]]]:443
prefix [[ip|2a02:8109:9a80::]]/48
addr [[ip|2001:4860:4860:0:0:0:0:8888]]
gw [[ip|2a01:4f8:c17:b0f::2%eth0]]
Client-IP: [[ip|77.22.9.100]]
failed login for root from [[ip|218.92.0.56]] port 4711 ssh2
remote_addr="[[ip|176.9.1.18]]"
A record: mail IN A [[ip|176.9.14.18]]
Received: from x ([[ip|62.75.148.60]])
[2026-11-03] [[ip|66.249.66.1]] GET /robots.txt
upgrade from 1.2.3.4 to 1.2.4.0
OpenSSL 3.0.13.1 released
kernel 5.15.0.91
java 17.0.9.8 LTS
jdk 1.8.0.202
Version 23.145.67.89
v31.101.4.150
firmware 1.0.0.185
numpy>=1.26.4.120
pip install foo==1.2.3.144
driver 31.0.101.45
Chrome 120.0.0.0
Windows 10.0.19041.1
iOS 17.4.1.1
1.3.6.1.4.1.9
.1.3.6.1
1.3.6.1 is iso.org
section 4.12.1.130
see 3.2.1.1 below
§ 4.3.2.1
Kapitel 2.3.1.4
chapitre 2.3.1.4
版本号：4.12.1.130
v4.12.1.130发布
LibreOffice 7.5.9.2
dll 6.3.9600.1
package-1.2.3.4.tar.gz
foo_1.2.3.4_amd64.deb
gcc 4.8.5.28
(1.2.3.4)
1.2.3.4
- 2.13.4.0: fixed bug
release 82.14.201.7
update to 82.14.201.7
82.14.201.7 released
build 82.14.201.7
ABP 4.4.0.99
.NET 4.8.1.0
10.20.30.40 and 172.20.3.4
100.64.3.2
169.254.10.20
198.51.100.23
256.1.2.300
EXIF 2023:10:05 13:55:36
3fff::1 2001:db8:1::2
fe80::1%eth0
fd12:3456:789a::1
2023:13:55:36
dead::beef
std::3a::b
bank [[iban|<iban DE>]]
IBAN: [[iban|<iban4 DE>]]
IBAN [[iban|<iban4 FR>]]
[[iban|<iban4 GB>]]
konto=[[iban|<iban NL>]],x
IBAN：[[iban|<iban4 ES>]]
iban: [[iban|<iban IT>]].
[[iban|<iban CH>]]
"iban":"[[iban|<iban AT>]]"
überweisen an [[iban|<iban4 AT>]] bis Freitag
virement [[iban|<iban4 BE>]] BIC X
[[iban|<iban4 PL>]]
([[iban|<iban4 SE>]])
IBAN[[iban|<iban DE>]]
to [[iban|<iban4 PT>]];
[[iban|<iban NO>]]
|[[iban|<iban4 DK>]]|
IBAN [[iban|<ibanlow DE>]]
IBAN [[iban|<ibandash DE>]]
[[iban|<iban SA>]] [[iban|<iban AE>]] [[iban|<iban TR>]]
[[iban|<iban4 LU>]] [[iban|<iban4 FI>]]
IBAN {{<badiban DE>}}
{{<badiban4 FR>}}
{{<badiban GB>}}
DE12 3456 7890
ID DE89370400440532013
DE{{####################}}
ref AB12 {{####}} {{####}} {{####}}
VAT DE123456789
BIC COBADEFFXXX
container MSCU{{#######}}
SSN: [[us_ssn|<ssn ->]]
ssn=[[us_ssn|<ssn >]]
Social Security Number [[us_ssn|<ssn ->]]
social security no. [[us_ssn|<ssn _>]]
name,[[us_ssn|<ssn ->]],1980-01-02
"ssn": "[[us_ssn|<ssn ->]]"
SSN [[us_ssn|<ssn _>]]
[[us_ssn|<ssn ->]]
patient [[us_ssn|<ssn ->]] admitted
soc sec [[us_ssn|<ssn ->]];
(SSN) [[us_ssn|<ssn ->]]
SS# [[us_ssn|<ssn ->]]
社会安全号 [[us_ssn|<ssn ->]]
W-2 for [[us_ssn|<ssn ->]] filed
the applicant's SSN is [[us_ssn|<ssn ->]].
000-12-3456
666-12-3456
912-34-5678
123-00-4567
123-45-0000
123-45-6789
078-05-1120
part no. 482-13-9921
order 482-13-9921
482-13-99210
1482-13-9921
482-13-9921-3
CAS 482-13-9
sku: 482-13-9921
model 482-13-9921
482 13 9921
482139921
Ticket #482-13-9921
invoice 482-13-9921
2024-13-9921
Steuer-ID: [[national_id|<detax>]]
IdNr. [[national_id|<detax _>]]
[[national_id|<detax _>]]
Steueridentifikationsnummer [[national_id|<detax>]]
NIR : [[national_id|<nir _>]]
numéro de sécurité sociale [[national_id|<nir>]]
[[national_id|<nir _>]]
NI number [[national_id|<nino _>]]
NINO: [[national_id|<nino>]]
[[national_id|<nino _>]]
DNI [[national_id|<dni>]]
NIE: [[national_id|<nie>]]
DNI: [[national_id|<dni ->]]
codice fiscale [[national_id|<cf>]]
CF: [[national_id|<cf>]]
AHV [[national_id|<ahv .>]]
[[national_id|<ahv .>]]
CPF: [[national_id|<cpf .>]]
cpf=[[national_id|<cpf>]]
주민등록번호 [[national_id|<rrn>]]
[[national_id|<rrn>]]
Aadhaar [[national_id|<aadhaar _>]]
aadhar no: [[national_id|<aadhaar>]]
NINO QQ 12 34 56 C
Steuer-ID 12 345 678 901
13 digits {{#############}}
{{<badnir _>}}
12345678A
ahv 756.1234.5678.90
{{###########}} plain
111.111.111-11
991345-1234567
case AB123456E
2345 6789 0123
卡号 [[bank_card|<visa _>]]
pan=[[bank_card|<visa>]]
card,[[bank_card|<visa ->]],09/27
Karte: [[bank_card|<visa _>]]
[[bank_card|<mc _>]]
cc [[bank_card|<mc ->]].
Visa [[bank_card|<visa .>]]
银行卡：[[bank_card|<union>]]
卡号：[[bank_card|<union _>]]
amex [[bank_card|<amex _>]]
[[bank_card|<amex>]]
身份证 [[cn_id|<cnid _>]]
身份证号：[[cn_id|<cnid _>]]
证件号,[[cn_id|<cnid>]],男
id=[[cn_id|<cnid>]]
身份证：[[cn_id|<cnid full>]]
[[cn_id|<cnid ->]]
aws_access_key_id = [[api_key|AKIA§§§§§§§§§§§§§§§§]]
AWS_SECRET_ACCESS_KEY=[[api_key|¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿/¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿]]
"SecretAccessKey": "[[api_key|¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿+¿¿¿¿¿¿¿¿¿¿¿¿]]"
"private_key_id": "[[api_key|¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤]]"
DefaultEndpointsProtocol=https;AccountName=acme;AccountKey=[[api_key|<b64 86>==]];EndpointSuffix=core.windows.net
Endpoint=sb://x.servicebus.windows.net/;SharedAccessKeyName=Root;SharedAccessKey=[[api_key|<b64 43>=]]
https://x.blob.core.windows.net/c?sv=2022-11-02&sp=r&sig=[[api_key|<b64u 40>%3D]]
AZURE_CLIENT_SECRET=[[api_key|¿¿¿8Q~¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿]]
OPENAI_API_KEY=[[api_key|sk-proj-¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿T3BlbkFJ¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿]]
[[api_key|sk-ant-api03-¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿AA]]
gsk: [[api_key|gsk_¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿]]
databricks [[api_key|dapi¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤]]
twilio [[api_key|SK¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤]]
sid [[api_key|AC¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤]]
client.run("[[api_key|MT¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿.G¿¿¿¿¿.¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿]]")
https://[[api_key|discord.com/api/webhooks/1#################/¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿]]
https://[[api_key|hooks.slack.com/services/T§§§§§§§§/B§§§§§§§§/¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿]]
[[api_key|gho_¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿]]
mailgun [[api_key|key-¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤]]
[[api_key|dop_v1_<hex 64>]]
HEROKU_API_KEY=[[api_key|¤¤¤¤¤¤¤¤-¤¤¤¤-4¤¤¤-a¤¤¤-¤¤¤¤¤¤¤¤¤¤¤¤]]
CLOUDFLARE_API_TOKEN="[[api_key|¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿]]"
accessKeySecret: [[api_key|¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿]]
SecretKey = "[[api_key|¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿]]"
Authorization: Bearer [[api_key|¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿]]
Authorization: Basic [[api_key|YWRtaW46¿¿¿¿¿¿¿¿¿¿¿¿]]
-H "X-API-Key: [[api_key|¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤]]"
postgres://app:[[api_key|k9#Vz¿¿¿¿]]@db.example.net:5432/x
mongodb+srv://svc:[[api_key|¿¿¿¿¿¿¿¿¿¿¿¿]]@cluster0.example.net/
redis://:[[api_key|¿¿¿¿¿¿¿¿¿¿]]@cache:6379/0
https://bob:[[api_key|¿¿¿¿4¿¿¿]]@git.example.com/r.git
Server=db;Database=x;User Id=sa;Password=[[api_key|P¿¿¿9!¿¿a]];
jdbc:mysql://h/x?user=a&password=[[api_key|¿¿¿7¿¿¿¿x]]
export DB_PASSWORD='[[api_key|¿¿¿¿¿¿8¿¿x¿¿]]'
mysql --password=[[api_key|¿¿¿¿¿¿8¿¿x]] -h db
<password>[[api_key|¿¿¿¿¿¿8¿¿x]]</password>
<add key="ApiKey" value="[[api_key|¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿8¿x]]" />
密码：[[api_key|Xk¿¿¿¿9¿¿]]
os.environ["API_KEY"] = "[[api_key|¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿4x]]"
token: [[api_key|¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿4x]]
--token [[api_key|¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿4x]]
clientSecret: '[[api_key|¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿4x]]',
api key: [[api_key|¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿4x]]
WANDB_API_KEY=[[api_key|¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤]]
"auth":"[[api_key|eyJ¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿.eyJ¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿.¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿]]"
https://api.telegram.org/bot[[api_key|7########:AA¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿]]/getMe
pat [[api_key|glpat-<w 20>]]
vault [[api_key|hvs.¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿]]
[[api_key|ya29.¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿]]
[[api_key|GOCSPX-¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿]]
shopify [[api_key|shpat_¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤]]
API_KEY=${API_KEY}
api_key = os.getenv("SERVICE_API_KEY_V2")
api_key = settings.API_KEY_V2_PROD
token = tokens[12345678901234567]
next_page_token: {{¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿}}
csrf_token = "{{¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿}}"
public_key: {{¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿¿}}
cache_key={{¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤}}
etag "{{¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤}}"
commit {{¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤}}
trace_id={{¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤¤}}
request {{¤¤¤¤¤¤¤¤}}-{{¤¤¤¤}}-4{{¤¤¤}}-a{{¤¤¤}}-{{¤¤¤¤¤¤¤¤¤¤¤¤}}
integrity="sha512-<b64 86>=="
sha512: <b64 86>==
postgres://user:password@localhost/db
mysql://root:root@localhost
amqp://guest:guest@localhost
https://user:${TOKEN}@github.com
https://<user>:<pass>@host
http://{user}:{password}@{host}
redis://:changeme@cache
password = input("Password: ")
password = config.password1
password: min. 8 characters, 1 digit
Password must contain a-z, A-Z and 0-9
passwd=%s
pass: 12 of 14 tests, fail: 2
passed: test_a1b2c3
key: value1234
the key is C-sharp 440Hz
monkey: banana4567
tokens: 12345678
token_type: bearer
max_tokens=1234567890123456
keyboard = "qwerty-uiop-1234-asdf"
secret: the_meeting_is_at_10
foreign_key=users.id_2024_01_01_backup
sk-loading-dots-wave-animation-2
AKIAIOSFODNN7EXAMPLE
ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
hf_hub_download_from_cache_only_v2
Ruf mich an: [[phone|0171-234####]]
Tel.-Nr.: [[phone|05251 / 60 ####]]
Telefonnummer [[phone|0 30 / 90 18 ## ##]]
Notruf-Handy [[phone|+49-171-234####]]
Fon: [[phone|+49.30.9018####]]
Fax: [[phone|030-901822##-##]]
Mobile: [[phone|+49(0)171234####]]
[[phone|+49(30)9018####]]
[[phone|(+49) 30 9018####]]
[[phone|(0049) 30 9018####]]
[[phone|+49 (30) 9018-####]] (Zentrale)
Kontakt: Anna Weber, [[phone|0151 2345####]], anna
Anna Weber;[[phone|0151/2345####]];Köln
"telefon": "[[phone|030123####]]",
telefon = [[phone|030123####]]
Sie erreichen Herrn Koch unter [[phone|0621 / 123#-###]].
Wählen Sie [[phone|0800 330 ####]]
tel [[phone|030 123####]] oder [[phone|0171 123####]]
Tel: [[phone|030-123####]], [[phone|030-123####]]
Tél : [[phone|01 44 55 ## ##]] / [[phone|06 12 34 ## ##]]
Mon portable est le [[phone|07.81.23.##.##]]
[[phone|061234####]] Jean
[[phone|+3361234####]]
[[phone|+33 6 12 34 ## ##]]
[[phone|+33.6.12.34.##.##]]
[[phone|(+33) 6 12 34 ## ##]]
[[phone|003361234####]]
tel:[[phone|+33-1-44-55-##-##]]
Tel. [[phone|01-44-55-##-##]]
Tel. [[phone|014455####]]
appeler le [[phone|01.44.55.##.##]] de 9h à 17h
tel=[[phone|061234####]]&nom=x
jean,dupont,[[phone|061234####]],paris
Phone: [[phone|020 7123 ####]]
[[phone|+44 20 7123 ####]]
[[phone|+44 (0)20 7123 ####]]
[[phone|+44(0)207123####]]
[[phone|0044 20 7123 ####]]
[[phone|07123 45####]]
[[phone|0712345####]]
[[phone|07123-45#-###]]
[[phone|0161 496 ####]]
[[phone|(020) 7123 ####]]
[[phone|(01223) 31####]]
[[phone|01223 31# ###]]
[[phone|0800 123 ####]]
[[phone|0345 600 ####]]
Please ring Mrs Jones on [[phone|01904 62####]] after six
Jones,[[phone|01904 62####]],York
[[phone|(212) 736-####]]
[[phone|212-736-####]]
[[phone|212.736.####]]
[[phone|+1 (212) 736-####]]
[[phone|+1212736####]]
[[phone|1-212-736-####]]
[[phone|1 (212) 736-####]]
[[phone|1.212.736.####]]
[[phone|(212)736-####]]
[[phone|(212) 736 ####]]
[[phone|212/736-####]]
[[phone|212-736-#### x12]]
[[phone|212-736-####, ext. 1204]]
[[phone|212-736-#### ext 12]]
phone: [[phone|212 736 ####]]
call me at [[phone|212736####]]
Call [[phone|212 736 ####]] now!
her cell is [[phone|212 736 ####]]
you can reach me at [[phone|212736####]]
text [[phone|212736####]] for details
phone=[[phone|212736####]]
{"phone_number":"[[phone|212736####]]"}
{"mobile":[[phone|212736####]]}
Home: [[phone|212-736-####]] Work: [[phone|646-736-####]]
[[phone|1-800-366-####]]
name=Bob,phone=[[phone|212-736-####]],age=3
Bob	[[phone|212-736-####]]	NY
[[phone|+1.212.736.####]]
[[phone|001 212 736 ####]]
[[phone|+86 138 1234 ####]]
[[phone|+861381234####]]
[[phone|00861381234####]]
[[phone|86-1381234####]]
[[phone|138-1234-####]]
[[phone|138 1234 ####]]
[[phone|１３８１２３４５６７９]]
[[phone|１３８－１２３４－５６７９]]
电话：[[phone|０１０－６２３４５６７８]]
张三，[[phone|1381234####]]，北京
张三,[[phone|1381234####]],北京
phone=[[phone|1381234####]]
电话=[[phone|1381234####]]
微信/手机:[[phone|1381234####]]
李四 [[phone|1381234####]]/[[phone|1391234####]]
李四[[phone|1381234####]]、[[phone|1391234####]]
TEL:[[phone|86-10-6234####]]
电话 [[phone|+86-10-6234####]]
电话 [[phone|+86 (10) 6234 ####]]
[[phone|+86 21 6234 ####]]
[[phone|010-6234####]]
[[phone|(010)6234####]]
[[phone|（010）6234####]]
[[phone|010 6234####]]
[[phone|0755-2612####转8012]]
[[phone|0755-26123456-####]]
热线：[[phone|400-820-####]]
电话：[[phone|6234####]]
{"mobile":"[[phone|1381234####]]"}
sms_to=[[phone|1381234####]];
user [[phone|1381234####]] logged in
[[phone|+34 612 34# ###]]
[[phone|+3461234####]]
tel. [[phone|61234####]]
Tfno: [[phone|912 34# ###]]
teléfono [[phone|91-234-##-##]]
[[phone|+39 06 1234 ####]]
[[phone|+39 347 123 ####]]
cell. [[phone|347123####]]
[[phone|+31 6 1234####]]
[[phone|06-1234####]]
[[phone|+41 79 123 ## ##]]
[[phone|079 123 ## ##]]
[[phone|+43 664 123####]]
[[phone|0664/123####]]
[[phone|+81 3-1234-####]]
[[phone|03-1234-####]]
[[phone|090-1234-####]]
[[phone|+82 10-1234-####]]
[[phone|010-1234-####]]
[[phone|+91 98765 4####]]
[[phone|+91-987654####]]
mobile [[phone|987654####]]
[[phone|+55 (11) 91234-####]]
[[phone|(11) 91234-####]]
[[phone|+61 2 9123 ####]]
[[phone|0412 34# ###]]
[[phone|+7 (916) 123-##-##]]
[[phone|8 (916) 123-##-##]]
[[phone|+90 532 123 ## ##]]
[[phone|+351 912 34# ###]]
[[phone|+48 512 34# ###]]
[[phone|+46 70 123 ## ##]]
[[phone|+358 40 123 ####]]
[[phone|+420 601 12# ###]]
[[phone|+353 87 123 ####]]
[[phone|+852 9123 ####]]
[[phone|+886 912 34# ###]]
[[phone|+52 55 1234 ####]]
[[phone|+27 82 123 ####]]
[[phone|+971 50 123 ####]]
[[phone|+1 416 736 ####]]
part 0171-2345678
SKU: 212-736-5000
Model 212-736-5000
Order 212-736-5000
Invoice no. 0301234567
Rechnung Nr. 0171/2345678
Best.-Nr. 0171 2345678
ISBN 978-3-16-148410-0
ISBN: 3161484100
ISBN-10: 0171234567
2026-11-03T10:22:31+01:00
2026-11-03 10:22:31.123456
10:22:31 20261103
1700000000000
[1700000000, 1700000060]
id: 2127365000
total 2127365000 bytes
0x13812345679
sum=13812345679.55
¥13812345679
price 13812345679 USD
serial no. 13812345679
S/N 212-736-5000
订单编号：13812345679
单号13812345679
快递单号：13812345679
交易流水号 13812345679
lat=31.2304167,lng=121.4737222
31.2304167, 121.4737222
-122.4194155,37.7749295
GPS 52.520008 13.404954
v1.2.3 2024.11.03
chr1:13812345679-13812345999
13812345679012345
1381234567
2381234567
DOI 10.1109/5.771073
12-34-56-78-90
00:1A:2B:3C:4D:5E
3.1415926535897932
100000000000
9999999999
1234567890
0123456789
123-456-7890
123-45-678
12.345.678,90 EUR
1.234.567.890
12 345 678 910
2 000 000 000
(2019) 123-4567
(1998) 0345
pp. 212-736
ratio 4:3:2
3-4-5-6-7-8-9
Room 212-736
Score 21-19, 19-21, 21-17
1914-1918 and 1939-1945
§ 212-736-5000
zip 10001-2345
02139-4307
license 0301234567
Konto 0301234567
Steuernummer 030/123/45678
HRB 123456
USt-IdNr. DE123456789
Bahn 0171 234
IMEI 490154203237518
MAC 0012.3456.7890
ASN 4134 64512
port 8080 9090 10001
1000000007
998244353
2147483647
4294967295
size: 13800000000
step 13912345678
loss 0.013812345679
13,812,345,679
13 812 345 679
13.812.345.679
[[email|tom@gmail.com]],[[email|ann@web.de]]
email=[[email|tom@gmail.com]]
"[[email|tom@gmail.com]]"
<[[email|tom@gmail.com]]>
'[[email|tom@gmail.com]]'
[[[email|tom@gmail.com]]](mailto:[[email|tom@gmail.com]])
[[email|tom+news@gmail.com]]
[[email|tom_b-c.d%e@sub.sub2.uni-koeln.de]]
[[email|"tom b"@gmail.com]]
[[email|用户@例子.公司]]
[[email|info@müller.de]]
[[email|info@xn--mller-kva.de]]
[[email|info@münchen.bayern]]
[[email|françois@société.fr]]
[[email|josé@correo.es]]
[[email|chris@firma.gmbh]]
[[email|x@foo.swiss]] [[email|x@foo.app]] [[email|x@foo.ai]]
[[email|x@foo.io]] [[email|x@foo.museum]] [[email|x@foo.photography]]
[[email|info@例え.jp]]
[[email|support@пример.рф]]
[[email|δοκιμή@παράδειγμα.ελ]]
[[email|tom at gmail dot com]]
[[email|tom[at]gmail[dot]com]]
[[email|tom (at) gmail (dot) com]]
[[email|tom(at)gmail.com]]
[[email|tom {at} gmail {dot} com]]
[[email|tom<at>gmail.com]]
[[email|tom @ gmail . com]]
[[email|tom AT gmail DOT com]]
[[email|tom-at-gmail-dot-com]]
[[email|tom_at_gmail_dot_com]]
reply to: [[email|TOM@GMAIL.COM]]
tom@gmail
tom@.com
@gmail.com
tom@@gmail.com
tom@gmail..com
foo@bar
foo@example.com foo@example.org foo@test.example
root@localhost
x@192.168.1.1
git@gitlab.com:a/b.git
ssh://git@github.com/a/b
pip install x@git+https://github.com/a/b
import("pkg@1.2.3")
npm i vue@next
docker pull a/b@sha256:0123456789abcdef
uses: actions/checkout@v4
@Override public
@media (min-width: 1px)
user@host:~$ ls
[root@server01 ~]#
C:\a@b.txt
file@2x.png
img@3x.webp
a@b.c
A@B
x@y.py
export AWS_SESSION_TOKEN=[[api_key|IQoJb3JpZ2luX2VjE<b64 300>]]
aws_session_token = "[[api_key|<b64 220>]]"
{"AccessKeyId":"[[api_key|ASIA§§§§§§§§§§§§§§§§]]","SecretAccessKey":"[[api_key|<b64 40>]]"}
spring.datasource.password=[[api_key|¿¿¿¿8¿¿x!]]
Pwd=[[api_key|¿¿¿¿8¿¿x]];Uid=a
PGPASSWORD=[[api_key|¿¿¿¿8¿¿x]] psql
curl -u admin:[[api_key|¿¿¿¿8¿¿x]] https://host/
curl --user admin:[[api_key|¿¿¿¿8¿¿x]] https://host/
sshpass -p '[[api_key|¿¿¿¿8¿¿x]]' ssh x
ftp://anna:[[api_key|¿¿¿¿8¿¿x]]@files.example.com/x
amqp://svc:[[api_key|¿¿¿¿8¿¿x]]@mq.example.net:5672/
mysql://root:[[api_key|S3cr3t!pw]]@db.example.com/shop
smtp://u%40x.com:[[api_key|¿¿¿¿8¿¿x]]@smtp.example.com:587
https://[[api_key|ghp_<w 36>]]@github.com/a/b.git
https://oauth2:[[api_key|glpat-<w 20>]]@gitlab.com/a/b.git
[[api_key|xoxp-############-############-############-<hex 32>]]
[[api_key|xapp-1-A§§§§§§§§§§-#############-<hex 64>]]
sentry: https://[[api_key|<hex 32>]]@o12345.ingest.sentry.io/123
//registry.npmjs.org/:_authToken=[[api_key|npm_<w 36>]]
machine api.host login me password [[api_key|¿¿¿¿8¿¿x]]
"client_id": "abc", "client_secret": "[[api_key|<w 32>]]"
clientSecret=[[api_key|¤¤¤¤¤¤¤¤-¤¤¤¤-4¤¤¤-a¤¤¤-¤¤¤¤¤¤¤¤¤¤¤¤]]
Ocp-Apim-Subscription-Key: [[api_key|<hex 32>]]
AZURE_OPENAI_KEY=[[api_key|<hex 32>]]
STRIPE_SECRET=[[api_key|sk_live_<w 24>]]
whsec=[[api_key|whsec_<w 32>]]
TWILIO_AUTH_TOKEN=[[api_key|<hex 32>]]
BAIDU_API_KEY = "[[api_key|<w 24>]]"
appsecret=[[api_key|<hex 32>]]
AppSecret: [[api_key|<hex 32>]]
app_secret = '[[api_key|<hex 32>]]'
SecretId: [[api_key|AKID<w 32>]]
SecretKey: [[api_key|<w 32>]]
accessKeyId: [[api_key|LTAI5t<w 18>]]
OSS_ACCESS_KEY_SECRET=[[api_key|<w 30>]]
jwt_secret: [[api_key|<w 40>]]
SECRET_KEY = 'django-insecure-[[api_key|<w 50>]]'
encryption_key: "[[api_key|<b64 43>=]]"
Bearer [[api_key|<w 40>]]
'Authorization': 'token [[api_key|<w 40>]]'
x-api-key: [[api_key|<w 40>]]
?api_key=[[api_key|<w 32>]]&q=1
?access_token=[[api_key|<w 32>]]
&key=[[api_key|AIza<w 35>]]
MAILCHIMP=[[api_key|<hex 32>-us12]]
[[api_key|SG.<w 22>.<w 43>]]
sendgrid: [[api_key|SG.<w 22>.<w 43>]]
[[api_key|hf_<w 34>]]
login: hf auth --token [[api_key|hf_<w 34>]]
[[api_key|sk-ant-api03-<w 93>AA]]
[[api_key|sk-<w 48>]]
[[api_key|sk-proj-<w 74>T3BlbkFJ<w 74>]]
DEEPSEEK_API_KEY=[[api_key|sk-<hex 32>]]
[[api_key|github_pat_<w 22>_<w 59>]]
[[api_key|ghs_<w 36>]]
[[api_key|dapi<hex 32>-2]]
DATABRICKS_TOKEN=[[api_key|dapi<hex 32>]]
[[api_key|pypi-AgEIcHlwaS5vcmc<w 120>]]
[[api_key|dckr_pat_<w 27>]]
[[api_key|##########:AA<w 33>]]
bot_token="[[api_key|##########:<w 35>]]"
https://api.telegram.org/bot[[api_key|##########:AA<w 33>]]/x
token = '[[api_key|MTk4NjIyNDgzNDcxOTI1MjQ4.Cl2FMQ.<w 27>]]'
HEROKU: [[api_key|HRKU-<w 60>]]
heroku api key is [[api_key|¤¤¤¤¤¤¤¤-¤¤¤¤-4¤¤¤-a¤¤¤-¤¤¤¤¤¤¤¤¤¤¤¤]]
X-Auth-Key: [[api_key|<hex 37>]]
cloudflare_api_token = [[api_key|<w 40>]]
[[api_key|v1.0-<hex 24>-<hex 146>]]
LINEAR=[[api_key|lin_api_<w 40>]]
[[api_key|pscale_tkn_<w 43>]]
密码是[[api_key|¿¿¿¿8¿¿x]]
数据库密码：[[api_key|¿¿¿¿8¿¿x]]
Passwort: [[api_key|¿¿¿¿8¿¿x]]
mot de passe : [[api_key|¿¿¿¿8¿¿x]]
contraseña: [[api_key|¿¿¿¿8¿¿x]]
| password | [[api_key|¿¿¿¿8¿¿x]] |
password,[[api_key|¿¿¿¿8¿¿x]]
- name: DB_PASSWORD↵  value: [[api_key|¿¿¿¿8¿¿x]]
api_key,[[api_key|<w 32>]]
{"password": "[[api_key|¿¿¿¿8¿¿x#]]", "u": 1}
wifi password: [[api_key|¿¿¿¿8¿¿x]]
passphrase "[[api_key|¿¿¿¿8¿¿x]]"
setApiKey("[[api_key|<w 32>]]")
api.login("u", password="[[api_key|¿¿¿¿8¿¿x]]")
getenv("API_KEY", "[[api_key|<w 32>]]")
AccountKey=[[api_key|<b64 86>==]]
account key: [[api_key|<b64 86>==]]
https://acct.blob.core.windows.net/c/b?sv=2022-11-02&st=2024-01-01T00%3A00Z&sr=b&sig=[[api_key|<b64u 43>%3D]]
"private_key": "[[api_key|-----BEGIN PRIVATE KEY-----↵MII<b64 60>↵<b64 64>↵-----END PRIVATE KEY-----↵]]"
[[api_key|-----BEGIN EC PRIVATE KEY-----↵<b64 64>↵<b64 64>↵-----END EC PRIVATE KEY-----]]
[[api_key|-----BEGIN PGP PRIVATE KEY BLOCK-----↵Version: 2↵↵<b64 64>↵=abcd↵-----END PGP PRIVATE KEY BLOCK-----]]
[[api_key|-----BEGIN ENCRYPTED PRIVATE KEY-----↵<b64 64>↵<b64 64>]]
-----BEGIN PUBLIC KEY-----↵{{<b64 64>}}↵-----END PUBLIC KEY-----
sha256 {{<hex 64>}}
"hash": "{{<hex 64>}}",
git rev {{<hex 40>}}
Digest: sha256:{{<hex 64>}}
docker image sha256:{{<hex 64>}}
md5sum {{<hex 32>}}  file
x-request-id: {{¤¤¤¤¤¤¤¤-¤¤¤¤-4¤¤¤-a¤¤¤-¤¤¤¤¤¤¤¤¤¤¤¤}}
session {{<hex 32>}}
data:image/png;base64,iVBORw0KGgo{{<b64 80>}}
ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{{<b64 43>}} me
fingerprint SHA256:{{<b64 43>}}
ETag: W/"{{<hex 32>}}"
blob {{<b64 120>}}
base64: {{<b64 64>}}==
api_key = "REPLACE_WITH_YOUR_KEY_1"
api_key: <api-key>
token: ${{ secrets.GITHUB_TOKEN }}
password: ${DB_PASSWORD}
password: "{{ vault_db_password_1 }}"
PASSWORD=$(pass show db1)
password=********
password: ********1a
secret = get_secret("db/prod/v2")
secretKeyRef: db-secret-2024
token = request.headers["X-Auth-Token-2"]
access_token_url = https://auth.host/oauth2/v1/token
token_endpoint: /oauth2/v2.0/token
secret santa: 24 Dec 2024
key length: 2048bits-rsa-2
password length 12-16 chars
passwords: 10 most common ones 2024
Passport: X1234567
pass@k: 0.72a
the token "##123abc" is split
tokenizer: gpt2-medium-124M-v2
token_ids=[101, 2023, 102]
key1=value1&key2=value2
keycode: 65a
public key: {{<b64 60>}}
primary_key = "user_id_20240101_v2"
idempotency_key={{<hex 32>}}
cache-key: node-modules-v2-{{<hex 64>}}
sk-container-id-1
ghp_short
AKIAEXAMPLE
hf_model_id
xoxb-your-token-here-000000000000
https://user:pass@example.com
http://username:password@host
ftp://anonymous:guest@host
redis://localhost:6379/0
http://host:8080/path@v2
ssh://git@host:22/x
jdbc:postgresql://host:5432/db?user=me
mailto:a:b@
http://[::1]:8080/@x
time 12:30:45@UTC
Bearer of bad news 2024 or so
basic authentication 2024
bearer: Name-of-Thing-2
[[ip|81.92.17.4]] - - [03/Nov/2026:10:22:31 +0000] "GET / HTTP/1.1" 200 12
[[ip|12.34.56.78]] - admin [03/Nov/2026:10:22:31 +0000] "GET"
Nov  3 10:22:31 host sshd[99]: Accepted publickey for bob from [[ip|12.34.56.78]] port 4711 ssh2
iptables -A INPUT -s [[ip|185.220.101.33]] -j DROP
"ip": "[[ip|24.48.0.1]]"
ip=[[ip|24.48.0.1]]&x
IP-Adresse: [[ip|24.48.0.1]]
l'adresse IP [[ip|24.48.0.1]]
la IP [[ip|24.48.0.1]]
IP 地址 [[ip|24.48.0.1]]
http://[[ip|24.48.0.1]]/admin
[[ip|24.48.0.1]]:443
<[[ip|93.184.216.34]]>
([[ip|93.184.216.34]])
host: [[ip|93.184.216.34]],
'[[ip|93.184.216.34]]'
|[[ip|93.184.216.34]]|
a;[[ip|93.184.216.34]];b
ip：[[ip|93.184.216.34]]。
user@[[ip|93.184.216.34]]
tcp://[[ip|93.184.216.34]]:9000
peer=[[[ip|2a02:8109:9a80:1b40:5c3d:2f:9e1a:77]]]:80
[[ip|2001:470:1f0b:1a::2]]/64
inet6 [[ip|2a00:1450:4009:81f::200e]]
[[ip|2A00:1450:4009:81F::200E]]
ipv6=[[ip|2600:1f18:2551:8900::1]];
GET from [[ip|2409:8a00:1234:5678:9abc:def0:1234:5678]]
fe80::a00:27ff:fe4e:66a1 ::1 fd00::1 ff02::1 2001:db8::8a2e:370:7334
10.1.2.3 172.16.0.9 192.168.0.1 127.0.0.1 169.254.1.1 100.64.1.1 0.0.0.0 255.255.255.255 224.0.0.1 240.1.1.1
192.0.2.1 198.51.100.7 203.0.113.44 198.18.0.1
nginx/1.25.3.1
Mozilla/5.0 (Windows NT 10.0) Chrome/119.0.6045.123 Safari/537.36
Chrome 119.0.6045.123
version: "3.11.2.100"
Version 12.200.30.4
v12.200.30.4
ver. 12.200.30.4
R 4.3.2.1
node-v18.2.3.4
app 4.12.3.200 (build 7)
Build 4.12.3.200
PHP 8.1.2.1
Python 3.11.4.1 and Java 1.8.0.392
macOS 14.2.1.0
Android 13.0.0.1
firmware v1.23.45.67
FortiOS 7.0.12.1
NVIDIA driver 535.104.5.1
Upgraded libfoo from 2.31.0.8 to 2.35.0.3
libfoo (2.31.0.8) unstable
libssl1.1 1.1.1.14
mysql-connector-java-8.0.33.1.jar
com.example:artifact:1.2.3.4
foo==1.2.3.4
"foo": "^1.2.3.4",
<version>1.2.3.4</version>
AssemblyVersion("1.2.3.4")
FileVersion 6.2.19041.1
Release 5.4.3.2
Changelog 2.0.1.5
Section 1.2.3.4 describes
see 1.2.3.4 for details
1.2.3.4 Introduction
Table 5.1.2.3
Artikel 5.1.2.3
Kapitel 5.1.2.3
clause 8.2.3.1
ISO 27001 A.8.2.3.1
OID 1.2.840.113
OID: 2.5.29.15
1.3.6.1.4.1.311.21.20
EC 3.4.21.4
enzyme EC 1.1.1.27
trypsin (EC 3.4.21.4)
03.11.20.26
on 3.11.26.10
12.30.45.99
score 21.19.21.17
BIOS 1.14.0.5
IBAN: [[iban|<iban4 DE>]], BIC: COBADEFFXXX
IBAN [[iban|<iban FR>]]
IBAN [[iban|<iban4 GB>]]
IBAN [[iban|<iban4 IT>]]
IBAN [[iban|<iban4 NL>]] t.n.v. Jan
[[iban|<iban4 CH>]]
Konto: [[iban|<iban4 DE>]] (Sparkasse)
bitte auf [[iban|<iban DE>]] überweisen
account=[[iban|<iban DE>]]&bic=
"[[iban|<iban4 ES>]]"
汇款至[[iban|<iban DE>]]
<[[iban|<iban DE>]]>
IBAN:[[iban|<iban4 SE>]]
DE{{<badiban DE>}}
X{{<iban DE>}}Y
SSN: [[us_ssn|<ssn ->]], DOB 01/02/1980
SSN [[us_ssn|<ssn >]]
social security number: [[us_ssn|<ssn >]]
SSN#: [[us_ssn|<ssn ->]]
ss number [[us_ssn|<ssn ->]]
my social is [[us_ssn|<ssn ->]]
'[[us_ssn|<ssn ->]]'
a,[[us_ssn|<ssn ->]],b
ssn:[[us_ssn|<ssn _>]]
employee_ssn=[[us_ssn|<ssn >]]
SSN 000-12-3456
SSN: 123-45-6789
SSN: 666-45-6789
SSN 987-65-4321
item 482-13-9921
Part # 482-13-9921
P/N 482-13-9921
catalog no 482-13-9921
case 482-13-9921
NDC 48213-9921-01
account 482-13-9921
acct# 482-13-9921
phone 482-13-9921x
2026-11-0342
482-139-921
ZIP+4 48213-9921
routing 482139921
EIN 48-2139921
EIN: 12-3456789
ITIN 912-70-1234
confirmation 482-13-9921
claim no. 482-13-9921
VIN 1HGCM82633A004352
Kreditkarte [[bank_card|<visa _>]]
carte bancaire n° [[bank_card|<mc _>]]
tarjeta [[bank_card|<visa _>]]
card number: [[bank_card|<visa>]]
card no.[[bank_card|<visa>]]
ccnum=[[bank_card|<mc>]];
"card":"[[bank_card|<mc>]]"
信用卡[[bank_card|<visa>]]
银联卡 [[bank_card|<union>]]
储蓄卡：[[bank_card|<union _>]]
[[bank_card|<amex _>]]
[[bank_card|<amex ->]]
4111 1111 1111 1111
tracking {{<visa>}}
order id {{<visa>}}
serial: {{<mc>}}
invoice #{{<visa>}}
transaction {{<visa>}}
订单号{{<visa>}}
ref {{<visa>}}
身份证号码[[cn_id|<cnid>]]
身份证号码：[[cn_id|<cnid>]]，
ID [[cn_id|<cnid>]]
id_card=[[cn_id|<cnid>]]
[[cn_id|<cnid>]],张三
"idNo":"[[cn_id|<cnid>]]"
身份证[[cn_id|<cnid full>]]
(身份证[[cn_id|<cnid _>]])
name;Steuer-ID;Ort↵Anna;[[national_id|<detax>]];Köln↵Bernd;[[national_id|<detax>]];Bonn
nss,prénom↵[[national_id|<nir>]],Léa
id,ssn↵1,[[us_ssn|<ssn >]]↵2,[[us_ssn|<ssn >]]
Name,Phone,City↵Tom,[[phone|212736####]],New York↵Ann,[[phone|646782####]],New York
name|mobile↵Ravi|[[phone|98########]]
姓名,电话↵王,[[phone|6234####]]
name,id↵Tom,{{212736####}}
Nom;Réf↵x;{{<nir>}}
National Insurance ref [[national_id|<nino _>]]
NI number, your ref: [[national_id|<nino _>]]
job ref: {{<nino _>}}
银行卡 [[bank_card|<union 6>]]
卡 [[bank_card|<union 6>]] 户名
please charge [[bank_card|<mc ->]] today
Chargennr. {{<mc>}}
v=spf1 ip6:[[ip|2a01:4f8:13b::]]/48 ip4:[[ip|81.169.146.0]]/24 -all
peer:[[ip|2a01:4f8:13b:77::5]]
Lottozahlen: 03 07 12 19 25 31
loto : 03 07 12 19 25
tirage 03 07 12 19 25 31 + 08
numéros 03 07 12 19 25
FIPS 0603744000
彩票号码 03 07 12 19 25 31
车牌号码 1234567
hf login [[api_key|hf_<alpha 34>]]
AccountKey=Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==
Num. Math. 11, p. 181-195 (1968)
vol. II, p. 212-226 (1971)
"""


def lines(draw: random.Random) -> Iterator[str]:
    """Each line twice, with other values."""
    for line in LINES.strip().split("\n"):
        for _ in range(2):
            marked = re.sub(r"\[\[(\w+)\|(.*?)\]\]", lambda m: f"[[{m[1]}|{fill(draw, m[2])}]]", line)
            plain = re.sub(r"\{\{(.*?)\}\}", lambda m: fill(draw, m[1]), marked)
            yield plain.replace("↵", "\n")
            if plain == line:
                break
